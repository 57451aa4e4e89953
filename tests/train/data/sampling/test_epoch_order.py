"""Order and plan of training data: every unit once an epoch, independent of world size."""

from itertools import chain, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.sampling import epoch_order
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import DocSpans, EpochOrder, Shuffle, SplitSizes, hash_key, permutation
from train.errors import UserError


def split_sizes(shards: list[list[int]]) -> SplitSizes:
    return SplitSizes(
        np.array([len(sizes) for sizes in shards], np.int64),
        np.array([sum(sizes) for sizes in shards], np.int64),
        np.array(list(chain.from_iterable(shards)), np.int64),
    )


def tokens_of(spans: DocSpans) -> list[tuple[int, int]]:
    """(sample, offset) of every token of some spans; padding is (-1, 0)."""
    tokens = []
    for sample, start, length in zip(*(column.tolist() for column in spans), strict=True):
        tokens += [(sample, start + i) if sample >= 0 else (-1, 0) for i in range(length)]
    return tokens


corpora = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=9)


@st.composite
def plans(draw):
    shards = draw(corpora)
    streams = draw(st.integers(1, 7))
    shape = StepShape(streams * draw(st.integers(1, 3)), draw(st.integers(1, 17)), streams, draw(st.booleans()))
    shuffle = Shuffle(draw(st.integers(0, 3)), draw(st.integers(1, 4)))
    return shards, BatchPlan(EpochOrder(split_sizes(shards), shuffle, shape.pack), shape)


@given(plans(), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_every_token_comes_exactly_once_an_epoch(drawn, epoch):
    shards, plan = drawn
    sizes = chain.from_iterable(shards)
    cursor, seen = Cursor(epoch, 0), []
    for _ in range(plan.steps_per_epoch):
        assert cursor.epoch == epoch
        spans = plan.row_spans(range(plan.shape.streams), cursor, 1)
        assert spans.length.sum() == plan.shape.rows * plan.shape.seq_len
        seen += [token for token in tokens_of(spans) if token[0] >= 0]
        cursor = plan.after(cursor)
    assert cursor == Cursor(epoch + 1, 0)
    expected = []
    for sample, size in enumerate(sizes):
        read = size if plan.shape.pack else min(size, plan.shape.seq_len)
        expected += [(sample, offset) for offset in range(read)]
    assert sorted(seen) == expected


@given(plans(), st.integers(1, 7), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_rows_are_equal_for_any_rank_and_number_of_steps_at_once(drawn, world, steps):
    _, plan = drawn
    T, rows_each = plan.shape.seq_len, plan.rows_per_stream(Cursor())
    cursor = plan.after(Cursor(1, 0), plan.steps_per_epoch // 2)
    steps = min(steps, plan.steps_left(cursor))
    by_rank = {}
    for rank in range(min(world, plan.shape.streams)):
        own = range(rank, plan.shape.streams, min(world, plan.shape.streams))
        line = tokens_of(plan.row_spans(own, cursor, steps))
        for n, stream in enumerate(own):
            by_rank[stream] = line[n * steps * rows_each * T : (n + 1) * steps * rows_each * T]
    for step in range(steps):
        whole = tokens_of(plan.row_spans(range(plan.shape.streams), plan.after(cursor, step), 1))
        for stream in range(plan.shape.streams):
            mine = by_rank[stream][step * rows_each * T : (step + 1) * rows_each * T]
            assert mine == whole[stream * rows_each * T : (stream + 1) * rows_each * T]


@given(plans(), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_cursor_by_arithmetic_equals_cursor_by_steps(drawn, steps):
    _, plan = drawn
    cursor = Cursor()
    for _ in range(steps):
        cursor = plan.after(cursor)
    assert plan.after(Cursor(), steps) == cursor
    assert Cursor.from_dict(cursor.to_dict()) == cursor
    plan.check_cursor(cursor)


@given(plans())
@settings(max_examples=60, deadline=None)
def test_streams_differ_in_size_by_at_most_one_unit(drawn):
    shards, plan = drawn
    units = sum(map(sum, shards)) if plan.shape.pack else sum(map(len, shards))
    steps = plan.steps_per_epoch
    tokens = np.array(tokens_of(plan.row_spans(range(plan.shape.streams), Cursor(), steps)))
    filled = (tokens[:, 0] >= 0).reshape(plan.shape.streams, -1).sum(1).tolist()
    if plan.shape.pack:
        assert sum(filled) == units
        assert max(filled) - min(filled) <= 1


def test_streams_are_ranges_of_the_epoch_order():
    # 10 tokens in three samples, two streams of five; rows of two tokens, one row of each stream a step.
    order = EpochOrder(split_sizes([[3], [4, 3]]), Shuffle(0, 0), True)
    plan = BatchPlan(order, StepShape(2, 2, 2))
    steps = [tokens_of(plan.row_spans(range(2), Cursor(0, position), 1)) for position in (0, 2, 4)]
    assert steps == [
        [(0, 0), (0, 1), (1, 2), (1, 3)],
        [(0, 2), (1, 0), (2, 0), (2, 1)],
        [(1, 1), (-1, 0), (2, 2), (-1, 0)],
    ]


def test_another_epoch_or_seed_has_another_order():
    sizes = split_sizes([[5] * 30 for _ in range(8)])

    def line(seed, epoch):
        order = EpochOrder(sizes, Shuffle(seed, 4), True)
        return order.spans(epoch, np.array([0]), np.array([order.units]))[0].sample.tolist()

    assert line(0, 0) == line(0, 0)
    assert len({tuple(line(seed, epoch)) for seed, epoch in product(range(3), range(3))}) == 9


def test_samples_are_permuted_only_within_their_window():
    order = EpochOrder(split_sizes([[1] * 10 for _ in range(9)]), Shuffle(3, 3), True)
    line = order.spans(0, np.array([0]), np.array([90]))[0].sample
    for window in range(3):
        of_window = line[window * 30 : (window + 1) * 30]
        assert len(set((of_window // 10).tolist())) == 3
        assert sorted(of_window.tolist()) != of_window.tolist()


def test_permutation_and_data_hash_never_change():
    # Recorded once: in every later version a resumed run must read what the first run would have read.
    assert permutation(np.arange(10), hash_key(1, 2, 3)).tolist() == [1, 8, 3, 9, 4, 5, 0, 2, 7, 6]
    order = EpochOrder(split_sizes([[7], [1], [100], [3, 4]]), Shuffle(5, 2), True)
    assert BatchPlan(order, StepShape(4, 8, 2)).data_hash(Cursor(2, 16)) == "0bd3f070eb39ca9f"


@given(st.integers(0, 200), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permutation_holds_every_index_once(count, key):
    assert sorted(permutation(np.arange(count), key).tolist()) == list(range(count))


def test_first_elements_of_permutations_are_uniform():
    counts = np.bincount([permutation(np.arange(8), hash_key(seed))[0] for seed in range(4000)], minlength=8)
    assert abs(counts - 500).max() < 100  # 4.8 standard deviations


def test_data_hash_differs_by_step_and_depends_on_the_plan_alone():
    shards = [[9] * 7, [30], [2] * 100]
    hashes = []
    for _ in range(2):
        plan = BatchPlan(EpochOrder(split_sizes(shards), Shuffle(0, 2), True), StepShape(8, 4, 4))
        cursors = [plan.after(Cursor(), step) for step in range(2 * plan.steps_per_epoch)]
        hashes.append([plan.data_hash(cursor) for cursor in cursors])
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == len(hashes[0])
    assert all(len(digits) == 16 for digits in hashes[0])


def test_window_cache_of_one_byte_changes_nothing(monkeypatch):
    sizes = split_sizes([[3, 1, 4]] * 20)
    plan = BatchPlan(EpochOrder(sizes, Shuffle(0, 2), True), StepShape(4, 5, 4))
    expected = [plan.data_hash(plan.after(Cursor(), step)) for step in range(plan.steps_per_epoch)]
    monkeypatch.setattr("train.data.sampling.epoch_order._CACHE_BYTES", 1)
    plan = BatchPlan(EpochOrder(sizes, Shuffle(0, 2), True), StepShape(4, 5, 4))
    assert [plan.data_hash(plan.after(Cursor(), step)) for step in range(plan.steps_per_epoch)] == expected


def test_data_hash_leaves_the_windows_of_a_loader_in_the_cache(monkeypatch):
    monkeypatch.setattr("train.data.sampling.epoch_order._CACHE_BYTES", 1)
    order = EpochOrder(split_sizes([[3, 1, 4]] * 20), Shuffle(0, 2), True)
    plan, permuted = BatchPlan(order, StepShape(4, 5, 4)), []
    permutation = epoch_order.permutation
    monkeypatch.setattr(epoch_order, "permutation", lambda *given: permuted.append(given) or permutation(*given))
    plan.row_spans([0], Cursor(), 1)
    plan.data_hash(Cursor())
    permuted.clear()
    plan.row_spans([0], Cursor(), 1)
    assert not permuted


def test_a_billion_samples_are_planned_in_no_time():
    # Only sums of shards and the windows needed are read: the sizes of samples are a broadcast view of one number.
    shards, each = 50_000, 20_000
    sizes = np.broadcast_to(np.int64(500), shards * each)
    sizes = SplitSizes(np.full(shards, each), np.full(shards, 500 * each), sizes)
    plan = BatchPlan(EpochOrder(sizes, Shuffle(0, 16), True), StepShape(8, 1024, 8))
    cursor = Cursor(3, 1024 * 40_000_000)
    assert plan.row_spans(range(8), cursor, 1).length.sum() == 8 * 1024
    assert plan.data_hash(cursor) == plan.data_hash(cursor)


def test_batch_that_streams_do_not_divide_is_refused_with_the_cure():
    order = EpochOrder(split_sizes([[10]]), Shuffle(0, 1), True)
    with pytest.raises(UserError, match=r"batch.global=10 .* data.streams=4.*divisor of 10"):
        BatchPlan(order, StepShape(10, 8, 4))


@pytest.mark.parametrize("cursor", [Cursor(0, 100), Cursor(-1, 0), Cursor(0, -8)])
def test_cursor_of_another_corpus_is_refused(cursor):
    plan = BatchPlan(EpochOrder(split_sizes([[50, 50]]), Shuffle(0, 1), True), StepShape(2, 8, 2))
    with pytest.raises(UserError, match="saved data position"):
        plan.check_cursor(cursor)


def test_empty_split_is_refused():
    with pytest.raises(UserError, match="no documents"):
        BatchPlan(EpochOrder(split_sizes([]), Shuffle(0, 1), True), StepShape(2, 8, 2))
