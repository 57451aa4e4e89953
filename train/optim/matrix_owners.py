"""Brings whole matrices together on one rank each, from ZeRO's shards of them, and takes results back to the shards.

The owner of a matrix is the rank that holds most of it, so at ZeRO 1 and 2 hardly any element travels: there a matrix
lies on one rank, but where two ranks' parts of the flat tensor meet. At ZeRO 3 every element travels once each way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from train.distributed import process_group
from train.distributed.param_shard import ParamShard

Ranges = Sequence[Sequence[tuple[int, int]]]
"""By rank, then by matrix: the first element of the flattened matrix that the rank holds, and their number.

Ranks hold them in their order, each a part of every tensor.
"""


class MatrixOwners:
    """The matrices of one of ZeRO's flat tensors, each with the rank that receives all of it."""

    def __init__(self, matrices: Sequence[tuple[torch.Size, ParamShard]], world: process_group.DistContext) -> None:
        """``matrices``: whole shape and this rank's shard of each, in one order on every rank. A collective."""
        self.shapes = [shape for shape, _ in matrices]
        self.shards = [shard for _, shard in matrices]
        self.rank, self.device = world.rank, world.device
        self.ranges: Ranges = process_group.gather_objects([(shard.start, shard.numel) for shard in self.shards])
        self.owners = assign_owners(self.shapes, self.ranges)
        self.owned: list[list[int]] = [[] for _ in self.ranges]
        """By rank: the numbers of the matrices that it owns."""
        for number, owner in enumerate(self.owners):
            self.owned[owner].append(number)
        self.own = self.owned[self.rank]
        self._travels = any(
            numel and owner != rank
            for rank, ranges in enumerate(self.ranges)
            for owner, (_, numel) in zip(self.owners, ranges, strict=True)
        )

    def collect(self, flat: Tensor) -> list[Tensor]:
        """The matrices that this rank owns, each (R, C), out of every rank's ``flat`` tensor. A collective."""
        pieces: list[list[Tensor]] = [[] for _ in self.ranges]
        for owner, shard in zip(self.owners, self.shards, strict=True):
            pieces[owner].append(shard.view_of(flat).to(self.device))
        sizes = [self._held(rank, self.own) for rank in range(len(self.ranges))]
        received = zip(*self._exchange(pieces, sizes), strict=True)
        return [torch.cat(parts).view(self.shapes[number]) for number, parts in zip(self.own, received, strict=True)]

    def distribute(self, results: Sequence[Tensor]) -> Iterable[tuple[ParamShard, Tensor]]:
        """Each shard of this rank with its part (numel,) of its matrix's result, one (R, C) by owner. A collective."""
        flat, pieces = [result.reshape(-1) for result in results], []
        for ranges in self.ranges:
            pieces.append([whole.narrow(0, *ranges[number]) for number, whole in zip(self.own, flat, strict=True)])
        sizes = [self._held(self.rank, numbers) for numbers in self.owned]
        for numbers, parts in zip(self.owned, self._exchange(pieces, sizes), strict=True):
            yield from zip([self.shards[number] for number in numbers], parts, strict=True)

    def _held(self, rank: int, numbers: Iterable[int]) -> list[int]:
        """How many elements of each of these matrices a rank holds."""
        return [self.ranges[rank][number][1] for number in numbers]

    def _exchange(self, pieces: Sequence[list[Tensor]], sizes: Sequence[list[int]]) -> list[list[Tensor]]:
        """Sends each rank its pieces; what every rank has sent here, in pieces of ``sizes``."""
        nothing = torch.empty(0, device=self.device)
        if self._travels:
            return process_group.all_to_all([[nothing, *parts] for parts in pieces], sizes)
        # What this rank has for itself is all there is.
        return [pieces[rank] if rank == self.rank else [nothing] * len(lengths) for rank, lengths in enumerate(sizes)]


def assign_owners(shapes: Sequence[torch.Size], ranges: Ranges) -> list[int]:
    """The owner of each matrix: of the ranks that hold most of it, the one with the least work so far."""
    work = [0.0] * len(ranges)
    owners = []
    for number, shape in enumerate(shapes):
        held = [of_rank[number][1] for of_rank in ranges]
        owner = min((rank for rank, numel in enumerate(held) if numel == max(held)), key=work.__getitem__)
        work[owner] += math.prod(shape) * min(shape)
        owners.append(owner)
    return owners
