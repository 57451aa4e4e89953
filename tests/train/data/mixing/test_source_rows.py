"""Rows of one source: every unit once an epoch, no padding between epochs, far places beside each other."""

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.mixing.source_rows import SourceRows
from train.data.sampling.epoch_order import EpochOrder, Shuffle, SplitSizes


def epoch_order(shards: list[list[int]], pack: bool) -> EpochOrder:
    sizes = SplitSizes(
        np.array([len(sizes) for sizes in shards], np.int64),
        np.array([sum(sizes) for sizes in shards], np.int64),
        np.array(list(chain.from_iterable(shards)), np.int64),
    )
    return EpochOrder(sizes, Shuffle(3, 2), pack)


shard_lists = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=6)


@given(shard_lists, st.integers(1, 50), st.integers(1, 4), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_unit_comes_once_an_epoch(shards, row_units, epochs, pack):
    row_units = row_units if pack else 1
    order = epoch_order(shards, pack)
    source = SourceRows(order, row_units, limit=epochs * order.units)
    number = np.arange(source.rows)
    spans, owner, epoch = source.spans(number)
    seen = []
    for sample, start, length, of in zip(*(column.tolist() for column in (*spans, epoch)), strict=True):
        seen += [(of, sample, start + i) for i in range(length)]
    expected = []
    for sample, size in enumerate(chain.from_iterable(shards)):
        expected += [(of, sample, i) for of in range(epochs) for i in range(size)]
    assert sorted(seen) == sorted(expected)
    if pack:  # only the very last row is short
        filled = np.bincount(owner, weights=spans.length)
        begin, end = source.unit_ranges(number)
        assert (filled == end - begin).all()
        assert sorted(filled)[1:] == [row_units] * (len(filled) - 1)


@given(shard_lists, st.integers(1, 50), st.integers(0, 500), st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_rows_read_at_once_are_those_read_alone(shards, row_units, first, count):
    source = SourceRows(epoch_order(shards, True), row_units)
    number = np.arange(first, first + count)
    spans, owner, epoch = source.spans(number)
    for index, alone in enumerate(number):
        mine = owner == index
        single, _, its_epoch = SourceRows(epoch_order(shards, True), row_units).spans(np.array([alone]))
        assert all((a[mine] == b).all() for a, b in zip(spans, single, strict=True))
        assert (epoch[mine] == its_epoch).all()


def test_a_row_may_hold_many_epochs_of_a_source_smaller_than_it():
    source = SourceRows(epoch_order([[2, 1]], True), 10)
    spans, _, epoch = source.spans(np.array([0]))
    assert spans.length.sum() == 10
    assert sorted(set(epoch.tolist())) == [0, 1, 2, 3]


def test_rows_that_follow_each_other_are_far_apart_in_the_epoch():
    source = SourceRows(epoch_order([[100_000]], True), 10)
    begin, _ = source.unit_ranges(np.arange(64))
    assert np.diff(np.sort(begin)).min() > 1000
