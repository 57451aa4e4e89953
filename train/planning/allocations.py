"""Log of storages as they are allocated and freed, and the part of each in the peak."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from dataclasses import dataclass

from torch import Tensor, UntypedStorage

PARTS = (
    "weights",
    "gathered weights",
    "gradients",
    "master weights",
    "moments",
    "buckets",
    "activations",
    "logits",
    "update",
    "batch",
)
"""What memory is for, in the order in which it is reported. "update": temporaries of the optimizer's step."""


@dataclass(slots=True)
class Allocation:
    """A storage: its bytes, the times of its birth and its end on the log's clock, and its part."""

    nbytes: int
    born: int
    part: str
    freed: int | None = None


@dataclass(frozen=True)
class Peak:
    """Most bytes that lived at one time, and how many of them belong to each part."""

    nbytes: int
    parts: dict[str, int]


class AllocationLog:
    """Every storage that was shown to ``see``, for as long as it lives. Its clock counts allocations and frees."""

    def __init__(self) -> None:
        self.clock = 0
        self.allocations: list[Allocation] = []
        self._living: dict[int, Allocation] = {}

    def see(self, tensor: Tensor, part: str) -> None:
        """Log the storage of a tensor as ``part``, unless it is there already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living or not storage.nbytes():
            return
        self.clock += 1
        allocation = self._living[key] = Allocation(storage.nbytes(), self.clock, part)
        self.allocations.append(allocation)
        weakref.finalize(storage, self._free, key, allocation)

    def pass_by(self, nbytes: int, part: str) -> None:
        """Log a workspace that lives within one operator."""
        self.clock += 2
        self.allocations.append(Allocation(nbytes, self.clock - 1, part, self.clock))

    def name(self, tensor: Tensor | None, part: str, only: str | None = None) -> None:
        """Say what the storage of a tensor is for, now that it is known; where it is ``only`` that so far."""
        allocation = None if tensor is None else self._living.get(self._storage(tensor)._cdata)
        if allocation is not None and only in (None, allocation.part):
            allocation.part = part

    def living(self, since: int = 0) -> list[Allocation]:
        """The allocations that live now and were made after the time ``since``."""
        return [allocation for allocation in self._living.values() if allocation.born > since]

    def peak(self, begin: int, end: int | None = None) -> Peak:
        """The peak between two times, ``end`` by default now, of all that lived then."""
        end = self.clock if end is None else end
        lived = [a for a in self.allocations if a.born <= end and (a.freed is None or a.freed > begin)]
        changes = [(max(a.born, begin), a.nbytes) for a in lived]
        changes += [(a.freed, -a.nbytes) for a in lived if a.freed is not None and a.freed <= end]
        changes.sort()
        sums = list(itertools.accumulate(nbytes for _, nbytes in changes))
        if not sums:
            return Peak(0, {})
        highest = max(range(len(sums)), key=sums.__getitem__)
        when, parts = changes[highest][0], Counter[str]()
        for allocation in lived:
            if allocation.born <= when and (allocation.freed is None or allocation.freed > when):
                parts[allocation.part] += allocation.nbytes
        return Peak(sums[highest], {part: parts[part] for part in PARTS if parts[part]})

    def _free(self, key: int, allocation: Allocation) -> None:
        self.clock += 1
        allocation.freed = self.clock
        self._living.pop(key, None)

    @staticmethod
    def _storage(tensor: Tensor) -> UntypedStorage:
        return tensor.untyped_storage()
