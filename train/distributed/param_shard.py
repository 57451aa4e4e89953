"""Pieces: the state of a model in training, without its ZeRO stage or world size.

A piece is a flat run of one parameter: its fp32 master weights and its moments, as this rank holds them. Engines show their
state as pieces and are filled from them; checkpoints are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from train.distributed.process_group import DistContext

MASTER = "weight"
"""The kind of a piece that holds fp32 weights; the others are the optimizer's own names, such as ``exp_avg``."""


@dataclass(frozen=True)
class ParamShard:
    """Elements [start, start + numel) of a flattened parameter, which this rank holds in ``holder`` from ``offset`` on."""

    name: str
    start: int
    numel: int
    holder: Tensor
    offset: int

    def view_of(self, tensor: Tensor) -> Tensor:
        """This piece's view of ``tensor``, which has the layout of the holder: (numel,)."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


class ShardedState(Protocol):
    """What can be saved and restored by pieces."""

    shapes: dict[str, torch.Size]
    """Every parameter's whole shape, by name; and that of what is carried."""
    param_shards: list[ParamShard]
    """Those of parameters that this rank holds."""
    carried: list[ParamShard]
    """Rows of what is carried from step to step beside weights (`train.models.carried_state`): those that no other rank has."""

    @property
    def replicated(self) -> bool:
        """Whether every rank holds every piece."""

    def states(self, piece: ParamShard) -> dict[str, Tensor]:
        """The kinds of a piece (MASTER, and the optimizer's moments) and views of them: (numel,) float32."""

    def load(
        self, read: Callable[[ParamShard, str], Tensor], kinds: Mapping[str, Collection[str]], updates: int
    ) -> None:
        """Fill every piece from ``read(piece, kind)``, its parameter's ``kinds``; ``updates`` is how many the moments have seen."""

    def scalars(self) -> dict[str, float]:
        """What else must be remembered, such as a loss scale."""

    def load_scalars(self, values: dict[str, float]) -> None:
        """Set what ``scalars`` gave."""


def frozen_shards(module: nn.Module, rank: int, ranks: int) -> list[ParamShard]:
    """The pieces of a module's parameters that are not trained, as ``rank`` of ``ranks`` keeps them: float32, beside the engine.

    Made before the engine is: it may make their working copies low in precision, or shard them.
    """
    shards = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            whole = parameter.detach().view(-1)
            share = -(-whole.numel() // ranks)
            start, end = min(rank * share, whole.numel()), min((rank + 1) * share, whole.numel())
            if start < end:
                holder = whole if ranks == 1 else whole[start:end].clone()
                shards.append(ParamShard(name, start, end - start, holder, 0))
    return shards


def row_shards(name: str, rows: Tensor, world: DistContext) -> list[ParamShard]:
    """The rows of a tensor that are this rank's, a piece each: row r belongs to rank r mod world, as stream r does."""
    size = rows[0].numel()
    return [ParamShard(name, row * size, size, rows, row * size) for row in range(world.rank, len(rows), world.size)]
