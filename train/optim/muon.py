"""Muon: orthogonalised momentum for matrices, AdamW for everything else, at every ZeRO stage.

Jordan et al. 2024. Momentum is elementwise, so ZeRO's flat shards hold it. Orthogonalisation needs a whole matrix:
one rank collects it (``matrix_owners``), works on it, and the result goes back to the shards. Clipping comes first,
then momentum, then the orthogonal update, as on one device. (DeepSpeed's own Muon orthogonalises first, and clips the
update.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.distributed import process_group
from train.distributed.param_shard import ParamShard
from train.optim.matrix_owners import MatrixOwners

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of a quintic that is steep at 0: ITERATIONS bring nearly any singular value to between 0.7 and 1.2."""
RMS = 0.2
"""Root mean square of an update, about that of AdamW's, so that both use one learning rate (Liu et al. 2025, 2.2)."""


class Muon(torch.optim.AdamW):
    """Groups with ``momentum`` hold matrices and use Muon; the others use AdamW. Weight decay is decoupled in both.

    m = momentum m + (1 - momentum) g
    u = orthogonalize(momentum m + (1 - momentum) g)
    w -= lr (0.2 sqrt(max(shape)) u + decay w)
    """

    shards: Mapping[Tensor, Sequence[tuple[torch.Size, ParamShard]]] | None = None
    """Under ZeRO: flat tensor -> (whole shape, this rank's shard, maybe empty) of each of its parameters.

    Their order is the same on all ranks. Without ZeRO: None.
    """
    world: process_group.DistContext
    dtype = torch.float32
    """Number format of the iterations on a CPU: bfloat16 halves their time where the run's own products have it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Arguments of AdamW."""
        super().__init__(*args, **options)
        self._owners: dict[Tensor, MatrixOwners] = {}

    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient. A collective under ZeRO."""
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            mean = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
            mean.lerp_(weight.grad, 1 - group["momentum"])
            lookahead = weight.grad.lerp(mean, group["momentum"])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            if self.shards is None:
                weight.add_(muon_update(lookahead, self.dtype), alpha=-group["lr"])
            else:
                self._step_shards(weight, lookahead, group["lr"])

    def _step_shards(self, flat: Tensor, lookahead: Tensor, lr: float) -> None:
        assert self.shards is not None
        if flat not in self._owners:
            self._owners[flat] = MatrixOwners(self.shards[flat], self.world)
        owners = self._owners[flat]
        updates = [muon_update(matrix, self.dtype) for matrix in owners.collect(lookahead)]
        for shard, update in owners.distribute(updates):
            shard.view_of(flat).add_(update.to(flat.device), alpha=-lr)


def muon_update(lookahead: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Update of a matrix (R, C) at learning rate 1: orthogonalised momentum, scaled to the size of AdamW's updates."""
    return orthogonalize(lookahead, dtype) * (RMS * math.sqrt(max(lookahead.shape)))


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate U V^T of a matrix (R, C) = U S V^T by Newton-Schulz iterations in ``dtype``; on a GPU in bf16."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.to(torch.bfloat16 if wide.is_cuda else dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrix else x.T).to(matrix.dtype).contiguous()
