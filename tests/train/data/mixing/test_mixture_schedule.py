"""Schedule of a mixture: shares in every block of rows, stages, sources that run out; all of it by arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.mixing.mixture_schedule import PARTS, Budgets, MixtureSchedule, Stage, parts_of, row_table, same_until
from train.errors import UserError

NAMES = "abcdefgh"
ROWS = 3000


def stage(first_row: int, *weights: float) -> Stage:
    return Stage(first_row, parts_of(weights, NAMES[: len(weights)]))


def endless(stages: list[Stage]) -> MixtureSchedule:
    return MixtureSchedule(stages, Budgets((None,) * len(stages[0].parts)))


@st.composite
def mixtures(draw):
    """(stages, budgets) of a few sources, all of which may run out."""
    count = draw(st.integers(1, 5))
    weights = st.lists(st.integers(0, 20), min_size=count, max_size=count).filter(any)
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 900), max_size=3)))]
    stages = [stage(first, *draw(weights)) for first in firsts]
    rows = draw(st.lists(st.none() | st.integers(1, 400), min_size=count, max_size=count))
    return stages, Budgets(tuple(rows), draw(st.booleans()))


@given(mixtures())
@settings(max_examples=60, deadline=None)
def test_rows_of_a_source_come_in_order_and_never_twice(drawn):
    stages, budgets = drawn
    schedule = MixtureSchedule(stages, budgets)
    source, number = schedule.locate(np.arange(ROWS))
    for k, rows in enumerate(budgets.rows):
        mine = number[source == k]
        assert mine.tolist() == list(range(len(mine)))
        assert rows is None or len(mine) <= rows
    assert (source >= 0).tolist() == [row < schedule.end for row in range(ROWS)]
    for row in (0, 1, 7, 500, ROWS):
        real = source[:row][source[:row] >= 0]
        assert schedule.counts(row).tolist() == np.bincount(real, minlength=len(budgets.rows)).tolist()


@given(mixtures())
@settings(max_examples=60, deadline=None)
def test_a_source_is_left_out_or_ends_training_only_after_its_last_row(drawn):
    stages, budgets = drawn
    schedule = MixtureSchedule(stages, budgets)
    for row, source in schedule.exhausted:
        assert schedule.counts(row)[source] == budgets.rows[source] == schedule.counts(row - 1)[source] + 1
    if budgets.stop and schedule.exhausted:
        assert schedule.end == schedule.exhausted[0][0]
    elif schedule.end <= stages[-1].first_row or schedule.end < ROWS:  # nothing is left that the stage has a share of
        last = [s for s in stages if s.first_row <= schedule.end][-1]
        left = schedule.counts(schedule.end)
        assert all(budgets.rows[k] == left[k] for k, part in enumerate(last.parts) if part)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 10**12), st.integers(1, 20_000))
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_to_a_few_rows_in_every_block_anywhere(weights, first, rows):
    schedule = endless([stage(0, *weights)])
    got = schedule.counts(first + rows) - schedule.counts(first)
    wanted = np.array(weights) / sum(weights) * rows
    assert got.sum() == rows
    assert np.abs(got - wanted).max() <= len(weights) + rows / PARTS
    source, _ = schedule.locate(first + np.arange(min(rows, 500)))
    assert (
        np.bincount(source, minlength=len(weights)).tolist()
        == (schedule.counts(first + len(source)) - schedule.counts(first)).tolist()
    )


def test_whole_tables_have_exactly_the_shares_asked_for():
    schedule = endless([stage(0, 0.7, 0.2, 0.1), stage(10 * PARTS, 0.25, 0.25, 0.5)])
    assert schedule.counts(10 * PARTS).tolist() == [700_000, 200_000, 100_000]
    later = schedule.counts(12 * PARTS) - schedule.counts(10 * PARTS)
    assert later.tolist() == [50_000, 50_000, 100_000]


def test_new_shares_from_a_row_on_change_no_row_before_it():
    old, new = [stage(0, 3, 1)], [stage(0, 3, 1), stage(800, 1, 3)]
    before, after = (endless(stages).locate(np.arange(2000)) for stages in (old, new))
    assert all((a[:800] == b[:800]).all() for a, b in zip(before, after, strict=True))
    assert (before[0][800:] != after[0][800:]).any()
    assert same_until(old, new, 800)
    assert not same_until(old, new, 801)


@given(mixtures(), st.integers(1, 1500))
@settings(max_examples=40, deadline=None)
def test_a_stage_cut_in_two_gives_the_same_rows(drawn, row):
    stages, budgets = drawn
    shares = [stage for stage in stages if stage.first_row < row][-1].parts
    later = [stage for stage in stages if stage.first_row > row]
    cut = [*(stage for stage in stages if stage.first_row < row), Stage(row, shares), *later]
    expected = [stage for stage in stages if stage.first_row != row]
    both = (MixtureSchedule(given, budgets).locate(np.arange(ROWS)) for given in (cut, expected))
    assert all((a == b).all() for a, b in zip(*both, strict=True))


def test_the_order_of_sources_stays_what_it_is():
    assert row_table(parts_of([0.5, 0.3, 0.2], "abc")).source[:10].tolist() == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1], "0 or more: b: -1"),
        ([0, 0], "all weights are 0"),
        ([1, float("nan")], "0 or more"),
        ([1, 1e-9], "weight of b is less than one part"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        parts_of(weights, "ab")
