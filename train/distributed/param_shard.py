"""Parameter shards: the state of a model in training, independent of ZeRO stage and world size.

A shard is a contiguous range of one flattened parameter, with its fp32 master weights and moments, as this rank holds
them. Engines expose their state as shards and are filled from them; checkpoints consist of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from train.distributed.process_group import DistContext, gather_objects

MASTER = "weight"
"""The kind of state that is fp32 weights; other kinds have the optimizer's names, such as ``exp_avg``."""


@dataclass(frozen=True)
class ParamShard:
    """Elements [start, start + numel) of a flattened parameter, which this rank holds in ``holder`` at ``offset``."""

    name: str
    start: int
    numel: int
    holder: Tensor
    offset: int

    def view_of(self, tensor: Tensor) -> Tensor:
        """The shard's view of ``tensor``, which has the layout of the holder: (numel,)."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


class ShardedState(Protocol):
    """Interface of state that is saved and restored by shards; the engine has it."""

    shapes: dict[str, torch.Size]
    """Whole shapes of all parameters, and of the carried states, by name."""
    param_shards: list[ParamShard]
    """Shards of parameters that this rank holds."""
    carried: list[ParamShard]
    """Shards of states carried from step to step (`train.models.carried_state`): this rank's rows, which no other rank
    has.
    """

    @property
    def replicated(self) -> bool:
        """Whether every rank holds every shard."""

    @property
    def evenly_sharded(self) -> bool:
        """Whether each rank holds, in order, an equal part of every parameter, and of every moment."""

    def states(self, shard: ParamShard) -> dict[str, Tensor]:
        """Views of a shard's state by kind, MASTER and the optimizer's moments: (numel,) float32 each."""

    def load(
        self, read: Callable[[ParamShard, str], Tensor], kinds: Mapping[str, Collection[str]], updates: int
    ) -> None:
        """Fill every shard from ``read(shard, kind)`` for its parameter's ``kinds``; ``updates`` is the count behind
        the moments.
        """

    def scalars(self) -> dict[str, float]:
        """Other numbers to save, such as a loss scale."""

    def load_scalars(self, values: dict[str, float]) -> None:
        """Restore the numbers of ``scalars``."""


def frozen_shards(module: nn.Module, rank: int, ranks: int, own: bool) -> list[ParamShard]:
    """Shards of a module's frozen parameters, as ``rank`` of ``ranks`` keeps them: float32 zeros, beside the engine.

    With ``own`` (one rank only) the parameters themselves, which are float32 then, are the holders. To be made before
    the engine, which may shard the parameters.
    """
    shards = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            share = -(-parameter.numel() // ranks)
            start = min(rank * share, parameter.numel())
            numel = min(share, parameter.numel() - start)
            if numel:
                holder = parameter if own else torch.zeros(numel, device=parameter.device)
                shards.append(ParamShard(name, start, numel, holder, 0))
    return shards


def row_shards(name: str, rows: Tensor, world: DistContext) -> list[ParamShard]:
    """This rank's rows of a tensor, a shard each: row r belongs to rank r mod world size, as stream r does."""
    size = rows[0].numel()
    return [ParamShard(name, row * size, size, rows, row * size) for row in range(world.rank, len(rows), world.size)]


def nonfinite_parameters(shards: Iterable[ParamShard]) -> list[str]:
    """Names of the parameters that hold a master weight, on any rank, that is infinite or no number. A collective."""
    own = [shard.name for shard in shards if not torch.isfinite(shard.view_of(shard.holder)).all()]
    return list(dict.fromkeys(chain.from_iterable(gather_objects(own))))
