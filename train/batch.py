"""The contract between data, objectives and metrics: what a Batch holds and what a loss is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""One micro-batch of B rows of T tokens:

    tokens     (B, T) int64   input ids
    targets    (B, T) int64   the id to predict at each position; IGNORE where nothing is trained
    positions  (B, T) int64   position within the document (or within the row, where documents are not kept apart)
    segments   (B, T) int32   which document of the row a token belongs to, from 1; 0 is padding

and what only some objectives and families have:

    source           (B,) int64    number, from 1, of the row's source in a mixture; 0: padding
    memory           (B,) int64    slot, from 1, of the state that the row continues; negative: reset it first; 0: none
                                   (`train.models.carried_state`)
    types            (B, T) int64  0 in the first text of a pair, 1 in the second
    next_targets     (B,) int64    0: the second text follows the first, 1: it is from elsewhere
    targets          (B, U)        of an encoder-decoder: the ids to predict after target_tokens (B, U),
                                   whose segments are target_segments (B, U)
    targets          (B,)          of a classifier: int64 the class, or float32 the score

A row of zero weight, as short ranks and short last batches run, has every target IGNORE (a score: NaN) and all else 0.
"""

Losses = dict[str, tuple[Tensor, Tensor]]
"""Named losses of one micro-batch: name -> (sum over trained targets, float32 scalar; count of them, int64 scalar).

Sums are divided once, by the count over all micro-batches and ranks; a mean of means is never taken. The loss over the
targets ``x_targets`` is called ``x_loss``. In evaluation there are other pairs too: see ``train.evaluate``.
"""

IGNORE = -100
TARGETS = "targets"


@dataclass(frozen=True)
class StepResult:
    """Losses, gradient norm and outcome of one optimizer step."""

    losses: dict[str, tuple[float, float]]
    """By name: this rank's sum over its trained targets, and their count."""
    grad_norm: float | Tensor
    """Of the global batch. A tensor may still be computed on the device: it is read where it is logged."""
    update_applied: bool
    """False where a non-finite gradient made the optimizer skip the update."""


SKIPPED_STEP = StepResult({"loss": (0.0, 0.0)}, math.nan, False)
"""The result of a step all of whose rows are masked: no forward pass, no update."""


def trained_mask(targets: Tensor) -> Tensor:
    """Mask of the targets that are trained on: not IGNORE, and for float scores not NaN."""
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORE


def count_targets(batch: Batch) -> dict[str, int]:
    """Number of trained targets of the batch, by the name of their loss."""
    return {
        k.removesuffix(TARGETS) + "loss": int(trained_mask(v).sum()) for k, v in batch.items() if k.endswith(TARGETS)
    }


def count_tokens(batch: Batch) -> int:
    """Number of tokens of text in the batch, padding left out."""
    return int((batch["segments"] > 0).sum())


def mask_rows(batch: Batch) -> None:
    """Turn all rows of a batch into padding, in place."""
    for key, value in batch.items():
        nothing = math.nan if value.is_floating_point() else IGNORE
        value.fill_(nothing if key.endswith(TARGETS) else 0)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; pinned memory is copied without waiting."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
