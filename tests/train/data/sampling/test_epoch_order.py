"""The plan of training data: every unit once an epoch, the same for any world, reached from anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import DocSpans, EpochOrder, Shuffle, SplitSizes, hash_key, permutation
from train.errors import UserError


def layout_of(shards: list[list[int]]) -> SplitSizes:
    return SplitSizes(
        np.array([len(sizes) for sizes in shards], np.int64),
        np.array([sum(sizes) for sizes in shards], np.int64),
        np.array([size for sizes in shards for size in sizes], np.int64),
    )


def places(pieces: DocSpans) -> list[tuple[int, int]]:
    """Every (sample, place) of some pieces; padding as (-1, 0)."""
    found = []
    for sample, start, length in zip(*(column.tolist() for column in pieces), strict=True):
        found += [(sample, start + i) if sample >= 0 else (-1, 0) for i in range(length)]
    return found


corpora = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=9)


@st.composite
def plans(draw):
    shards = draw(corpora)
    streams = draw(st.integers(1, 7))
    shape = StepShape(streams * draw(st.integers(1, 3)), draw(st.integers(1, 17)), streams, draw(st.booleans()))
    shuffle = Shuffle(draw(st.integers(0, 3)), draw(st.integers(1, 4)))
    return shards, BatchPlan(EpochOrder(layout_of(shards), shuffle, shape.pack), shape)


@given(plans(), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_every_place_comes_exactly_once_an_epoch(drawn, epoch):
    shards, plan = drawn
    sizes = [size for shard in shards for size in shard]
    cursor, seen = Cursor(epoch, 0), []
    for _ in range(plan.steps_per_epoch):
        assert cursor.epoch == epoch
        pieces = plan.row_spans(range(plan.shape.streams), cursor, 1)
        assert pieces.length.sum() == plan.shape.rows * plan.shape.seq_len
        seen += [place for place in places(pieces) if place[0] >= 0]
        cursor = plan.after(cursor)
    assert cursor == Cursor(epoch + 1, 0)
    if plan.shape.pack:
        expected = [(sample, place) for sample, size in enumerate(sizes) for place in range(size)]
    else:
        T = plan.shape.seq_len
        expected = [(sample, place) for sample, size in enumerate(sizes) for place in range(min(size, T))]
    assert sorted(seen) == expected


@given(plans(), st.integers(1, 7), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_rows_do_not_depend_on_who_asks_nor_on_how_many_steps_at_once(drawn, world, steps):
    _, plan = drawn
    T, depth = plan.shape.seq_len, plan.rows_per_stream
    cursor = plan.after(Cursor(1, 0), plan.steps_per_epoch // 2)
    steps = min(steps, plan.steps_left(cursor))
    by_rank = {}
    for rank in range(min(world, plan.shape.streams)):
        own = range(rank, plan.shape.streams, min(world, plan.shape.streams))
        line = places(plan.row_spans(own, cursor, steps))
        for n, stream in enumerate(own):
            by_rank[stream] = line[n * steps * depth * T : (n + 1) * steps * depth * T]
    for step in range(steps):
        whole = places(plan.row_spans(range(plan.shape.streams), plan.after(cursor, step), 1))
        for stream in range(plan.shape.streams):
            mine = by_rank[stream][step * depth * T : (step + 1) * depth * T]
            assert mine == whole[stream * depth * T : (stream + 1) * depth * T]


@given(plans(), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_a_cursor_reached_by_arithmetic_is_the_one_reached_by_steps(drawn, steps):
    _, plan = drawn
    cursor = Cursor()
    for _ in range(steps):
        cursor = plan.after(cursor)
    assert plan.after(Cursor(), steps) == cursor
    assert Cursor.from_dict(cursor.to_dict()) == cursor
    plan.check_cursor(cursor)


@given(plans())
@settings(max_examples=60, deadline=None)
def test_streams_are_equal_to_one_unit(drawn):
    shards, plan = drawn
    units = sum(map(sum, shards)) if plan.shape.pack else sum(map(len, shards))
    steps = plan.steps_per_epoch
    pieces = plan.row_spans(range(plan.shape.streams), Cursor(), steps)
    rows = steps * plan.rows_per_stream * plan.shape.seq_len
    filled = [
        sum(place[0] >= 0 for place in places(pieces)[s * rows : (s + 1) * rows]) for s in range(plan.shape.streams)
    ]
    if plan.shape.pack:
        assert sum(filled) == units
        assert max(filled) - min(filled) <= 1


def test_streams_are_ranges_of_the_epochs_line():
    # 10 places in three samples, two streams of five; rows of two places, one row of each stream a step.
    order = EpochOrder(layout_of([[3], [4, 3]]), Shuffle(0, 0), True)
    plan = BatchPlan(order, StepShape(2, 2, 2))
    steps = [places(plan.row_spans(range(2), Cursor(0, position), 1)) for position in (0, 2, 4)]
    assert steps == [
        [(0, 0), (0, 1), (1, 2), (1, 3)],
        [(0, 2), (1, 0), (2, 0), (2, 1)],
        [(1, 1), (-1, 0), (2, 2), (-1, 0)],
    ]


def test_another_epoch_and_another_seed_have_another_order():
    layout = layout_of([[5] * 30 for _ in range(8)])

    def line(seed, epoch):
        order = EpochOrder(layout, Shuffle(seed, 4), True)
        return order.spans(epoch, np.array([0]), np.array([order.units]))[0].sample.tolist()

    assert line(0, 0) == line(0, 0)
    assert len({tuple(line(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_samples_are_permuted_only_among_the_shards_of_a_window():
    order = EpochOrder(layout_of([[1] * 10 for _ in range(9)]), Shuffle(3, 3), True)
    line = order.spans(0, np.array([0]), np.array([90]))[0].sample
    for window in range(3):
        of_window = line[window * 30 : (window + 1) * 30]
        assert len(set((of_window // 10).tolist())) == 3
        assert sorted(of_window.tolist()) != of_window.tolist()


def test_the_permutation_never_changes():
    # Worked out once and kept: a resumed run must read what the first would have read, in every later version.
    assert permutation(np.arange(10), hash_key(1, 2, 3)).tolist() == [1, 8, 3, 9, 4, 5, 0, 2, 7, 6]
    order = EpochOrder(layout_of([[7], [1], [100], [3, 4]]), Shuffle(5, 2), True)
    assert BatchPlan(order, StepShape(4, 8, 2)).data_hash(Cursor(2, 16)) == "0bd3f070eb39ca9f"


@given(st.integers(0, 200), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_a_permutation_holds_every_index_once(count, key):
    assert sorted(permutation(np.arange(count), key).tolist()) == list(range(count))


def test_first_places_of_permutations_are_uniform():
    counts = np.bincount([permutation(np.arange(8), hash_key(seed))[0] for seed in range(4000)], minlength=8)
    assert abs(counts - 500).max() < 100  # 4.8 standard deviations


def test_data_hash_tells_steps_apart_and_depends_on_the_plan_alone():
    shards = [[9] * 7, [30], [2] * 100]
    hashes = []
    for _ in range(2):
        plan = BatchPlan(EpochOrder(layout_of(shards), Shuffle(0, 2), True), StepShape(8, 4, 4))
        cursors = [plan.after(Cursor(), step) for step in range(2 * plan.steps_per_epoch)]
        hashes.append([plan.data_hash(cursor) for cursor in cursors])
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == len(hashes[0])
    assert all(len(digits) == 16 for digits in hashes[0])


def test_small_memory_for_windows_changes_nothing(monkeypatch):
    layout = layout_of([[3, 1, 4]] * 20)
    plan = BatchPlan(EpochOrder(layout, Shuffle(0, 2), True), StepShape(4, 5, 4))
    expected = [plan.data_hash(plan.after(Cursor(), step)) for step in range(plan.steps_per_epoch)]
    monkeypatch.setattr("train.data.sampling.epoch_order._CACHE_BYTES", 1)
    plan = BatchPlan(EpochOrder(layout, Shuffle(0, 2), True), StepShape(4, 5, 4))
    assert [plan.data_hash(plan.after(Cursor(), step)) for step in range(plan.steps_per_epoch)] == expected


def test_a_billion_samples_are_planned_at_once():
    # Only the shards' sums and the touched windows are looked at: the sizes of samples stay a view of one number.
    shards, each = 50_000, 20_000
    sizes = np.broadcast_to(np.int64(500), shards * each)
    layout = SplitSizes(np.full(shards, each), np.full(shards, 500 * each), sizes)
    plan = BatchPlan(EpochOrder(layout, Shuffle(0, 16), True), StepShape(8, 1024, 8))
    cursor = Cursor(3, 1024 * 40_000_000)
    assert plan.row_spans(range(8), cursor, 1).length.sum() == 8 * 1024
    assert plan.data_hash(cursor) == plan.data_hash(cursor)


def test_rows_that_streams_do_not_divide_are_refused_with_the_cure():
    order = EpochOrder(layout_of([[10]]), Shuffle(0, 1), True)
    with pytest.raises(UserError, match=r"batch.global=10 .* data.streams=4.*divisor of 10"):
        BatchPlan(order, StepShape(10, 8, 4))


@pytest.mark.parametrize("cursor", [Cursor(0, 100), Cursor(-1, 0), Cursor(0, -8)])
def test_a_cursor_of_another_corpus_is_refused(cursor):
    plan = BatchPlan(EpochOrder(layout_of([[50, 50]]), Shuffle(0, 1), True), StepShape(2, 8, 2))
    with pytest.raises(UserError, match="saved data position"):
        plan.check_cursor(cursor)


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no documents"):
        BatchPlan(EpochOrder(layout_of([]), Shuffle(0, 1), True), StepShape(2, 8, 2))
