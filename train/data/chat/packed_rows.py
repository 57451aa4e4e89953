"""Whole conversations packed into rows of one length, and how a shard stores such a row.

A row is one sample of a shard, so that the order of an epoch, its streams and a resume are the arithmetic of any
corpus whose rows are whole documents. Its ids are stored one conversation after another, 32 bits each: the id in the
low 24 bits, TRAINED where it is a target, BEGINS where a conversation begins.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.shards import ID_BITS

TRAINED = 1 << 31
BEGINS = 1 << 30
DTYPE = "uint32"


def mark_ids(ids: Sequence[int], trained: Sequence[bool]) -> NDArray[np.uint32]:
    """The ids of one conversation as they are stored."""
    stored = np.array(ids, np.uint32)
    stored |= np.where(np.array(trained, bool), np.uint32(TRAINED), np.uint32(0))
    stored[0] |= np.uint32(BEGINS)
    return stored


def read_marks(stored: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """(ids, trained, conversation of each from 1) of a stored row, (n,) each."""
    ids = (stored & np.uint32((1 << ID_BITS) - 1)).astype(np.int64)
    return ids, (stored & np.uint32(TRAINED)) != 0, np.cumsum((stored & np.uint32(BEGINS)) != 0)


def pack_best_fit(lengths: Iterable[int], room: int) -> list[list[int]]:
    """Rows of numbers of ``lengths``, each row's sum at most ``room``: best fit, the longest first (Ding et al. 2024).

    Each number goes to the row with the least room that takes it, the earliest of equals. The rows come in the order
    of their smallest numbers, and a row's numbers in theirs: a function of the lengths alone.
    """
    sizes = list(lengths)
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, number of the row), sorted
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        at = bisect.bisect_left(free, (sizes[number], -1))
        if at == len(free):
            rows.append([])
            left, row = room, len(rows) - 1
        else:
            left, row = free.pop(at)
        rows[row].append(number)
        bisect.insort(free, (left - sizes[number], row))
    return sorted(sorted(row) for row in rows)
