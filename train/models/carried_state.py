"""What a model carries from step to step beside its weights: one vector for every row of the global batch.

A row's memory belongs to its stream: whichever rank has the row has its memory too, so a checkpoint of one world serves any other.
A step reads the memories that the step before left, and what it leaves becomes theirs when its update is made, and only then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class CarriedState(nn.Module):
    """Float32 vectors (rows, size), all 0 at first, in any precision of the model; those of other ranks' rows mean nothing."""

    rows: Tensor

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(rows, size), persistent=False)
        self.left: list[tuple[Tensor, Tensor]] = []

    def read(self, numbers: Tensor) -> Tensor:
        """(B, size): what rows (B,) go on from; zeros where a number is not above 0. Numbers are those of a Batch."""
        return self.rows[(numbers.abs() - 1).clamp(min=0)] * (numbers > 0)[:, None]

    def leave(self, numbers: Tensor, vectors: Tensor) -> None:
        """What rows (B,) end with, (B, size), in training."""
        if self.training:
            self.left.append((numbers, vectors.detach().float()))

    @torch.no_grad()
    def commit(self, keep: bool) -> None:
        """The step is over: what it left is kept, or forgotten."""
        for numbers, vectors in self.left if keep else []:
            real = numbers != 0
            self.rows[numbers[real].abs() - 1] = vectors[real]
        self.left = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """To another device, but never to another precision."""
        super()._apply(fn, recurse)
        self.rows = self.rows.float()
        return self


def carried_states(module: nn.Module) -> list[CarriedState]:
    """Those of a model."""
    return [part for part in module.modules() if isinstance(part, CarriedState)]
