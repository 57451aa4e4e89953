"""Packing of whole conversations: nothing is lost or cut, rows are full, and the same lengths give the same rows."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from train.data.chat.packed_rows import mark_ids, pack_best_fit, read_marks


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_conversation_once_and_are_full(seed: int):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 100) for _ in range(1000)]
    rows = pack_best_fit(lengths, 128)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(1000))
    sums = [sum(map(lengths.__getitem__, row)) for row in rows]
    assert max(sums) <= 128
    assert sum(sums) / (128 * len(rows)) > 0.98
    assert pack_best_fit(lengths, 128) == rows


def test_each_goes_where_it_leaves_least_room():
    assert pack_best_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack_best_fit([], 10) == []
    assert pack_best_fit([10, 10], 10) == [[0], [1]]


def test_marks_of_stored_ids_come_back():
    stored = np.concatenate([mark_ids([7, (1 << 24) - 1, 9], [False, True, True]), mark_ids([3], [True])])
    ids, trained, conversation = read_marks(stored)
    assert ids.tolist() == [7, (1 << 24) - 1, 9, 3]
    assert trained.tolist() == [False, True, True, True]
    assert conversation.tolist() == [1, 1, 1, 2]
