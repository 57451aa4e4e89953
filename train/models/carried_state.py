"""Hidden states that a recurrent model carries from step to step, one vector per row of a batch.

A row's vector belongs to its stream: the rank that has the row has its vector, so a checkpoint of one world size serves
any other. A step reads the vectors that the step before wrote; what it writes counts only once its update is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class CarriedState(nn.Module):
    """Float32 vectors (rows, size), initially zero, in any precision of the model; other ranks' rows are undefined."""

    rows: Tensor

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(rows, size), persistent=False)
        self.staged: list[tuple[Tensor, Tensor]] = []

    def read(self, numbers: Tensor) -> Tensor:
        """Initial vectors (B, size) of rows (B,), numbered as in ``Batch["memory"]``; zeros where a number is <= 0."""
        return self.rows[(numbers.abs() - 1).clamp(min=0)] * (numbers > 0)[:, None]

    def stage_vectors(self, numbers: Tensor, vectors: Tensor) -> None:
        """Stage the final vectors (B, size) of rows, in training; ``commit`` makes them the new state."""
        if self.training:
            self.staged.append((numbers, vectors.detach().float()))

    @torch.no_grad()
    def commit(self, keep: bool) -> None:
        """End the step: the staged vectors become the state if ``keep``, else they are dropped."""
        for numbers, vectors in self.staged if keep else []:
            real = numbers != 0
            self.rows[numbers[real].abs() - 1] = vectors[real]
        self.staged = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to another device, but stay in float32."""
        super()._apply(fn, recurse)
        self.rows = self.rows.float()
        return self


def carried_states(module: nn.Module) -> list[CarriedState]:
    """All ``CarriedState`` modules of a model; empty for families that carry none."""
    return [part for part in module.modules() if isinstance(part, CarriedState)]
