"""The training loss of each source of a mixture, from the losses of single targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.batch import Batch, Losses, trained_mask


def losses_by_source(batch: Batch, losses: Tensor, names: Sequence[str]) -> Losses:
    """{"loss/<name>": (sum, count)} of a batch whose rows know their source, without gradient; else empty.

    ``losses`` has one loss for each of the batch's ``targets``, 0 where nothing is trained.
    """
    if "source" not in batch:
        return {}
    rows = len(batch["targets"])
    sums = losses.detach().reshape(rows, -1).sum(1)
    counts = trained_mask(batch["targets"]).reshape(rows, -1).sum(1)
    parts = {}
    for number, name in enumerate(names, 1):
        mine = batch["source"] == number
        parts[f"loss/{name}"] = torch.where(mine, sums, 0).sum(), torch.where(mine, counts, 0).sum()
    return parts
