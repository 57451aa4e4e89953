"""The contract between data, objectives and metrics: what a Batch holds and what a loss is."""

from __future__ import annotations

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""One micro-batch of B rows of T tokens:

    tokens     (B, T) int64   input ids
    targets    (B, T) int64   the id to predict at each place; IGNORE where nothing is trained
    positions  (B, T) int64   place within the document (or within the row, where documents are not kept apart)
    segments   (B, T) int32   which document of the row a token belongs to, from 1; 0 is padding

A row of zero weight, as short ranks and short last batches run, has every target IGNORE and every segment 0.
"""

Losses = dict[str, tuple[Tensor, Tensor]]
"""Named losses of one micro-batch: name -> (sum over trained places, float32 scalar; count of them, int64 scalar).

Sums are divided once, by the count over all micro-batches and ranks; a mean of means is never taken.
"""

IGNORE = -100


def count_targets(batch: Batch) -> int:
    """How many places of the batch are trained on."""
    return int((batch["targets"] != IGNORE).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; pinned memory is copied without waiting."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
