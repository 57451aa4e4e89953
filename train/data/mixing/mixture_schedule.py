"""Which source each row of training comes from, by arithmetic: a pure function of shares, stages and budgets.

Rows are numbered over the whole training, step after step. A stretch of rows with fixed shares is a *segment*. Inside
it the sources follow a table of PARTS rows, over and over, in which source k stands ``parts[k]`` times, spread evenly:
after any number of rows a source has had its share up to a row or two, and after PARTS rows exactly.

A new segment begins with each stage, and wherever a source is left out because it has run out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from train.data.sampling.epoch_order import Ints
from train.errors import UserError

PARTS = 100_000
"""Rows of a table, and so the parts that shares are counted in: five decimal places are kept exactly."""
ENDLESS = (1 << 62) - 1
"""The last row where training may go on for ever."""


def parts_of(weights: Sequence[float], names: Sequence[str]) -> tuple[int, ...]:
    """Weights as whole parts of PARTS, by largest remainders. Raises UserError for those that are no shares."""
    wrong = [f"{name}: {weight}" for name, weight in zip(names, weights, strict=True) if not 0 <= weight < np.inf]
    if wrong:
        raise UserError(f"weights of a mixture are 0 or more: {', '.join(wrong)}")
    total = sum(weights)
    if not total:
        raise UserError(f"all weights are 0 ({', '.join(names)}): give at least one source a share")
    exact = np.array(weights, np.float64) / total * PARTS
    parts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - parts), kind="stable")
    parts[order[: PARTS - int(parts.sum())]] += 1
    if tiny := [name for name, weight, part in zip(names, weights, parts, strict=True) if weight and not part]:
        raise UserError(f"the weight of {tiny[0]} is less than one part in {PARTS:,} of all: raise it, or set it to 0")
    return tuple(parts.tolist())


class RowTable:
    """The order of sources in PARTS rows: ``source`` (PARTS,) and ``before`` (PARTS,), its rows before this one."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        self.parts: Ints = np.array(parts, np.int64)
        source = np.repeat(np.arange(len(parts)), self.parts)
        before = np.arange(PARTS) - np.repeat(np.cumsum(self.parts) - self.parts, self.parts)
        # The i-th of n rows of a source belongs at (2 i + 1) / 2 n of the table.
        order = np.argsort((2 * before + 1) / (2 * self.parts[source]), kind="stable")
        self.source: Ints = source[order]
        self.before: Ints = before[order]

    def row_of(self, source: int, number: int) -> int:
        """The row, in endless repetition of the table, of the ``number``-th row of a source, both from 0."""
        rounds, number = divmod(number, int(self.parts[source]))
        return rounds * PARTS + int(np.flatnonzero(self.source == source)[number])

    def counts(self, rows: int) -> Ints:
        """How many of the first ``rows`` rows come from each source, (sources,)."""
        rounds, rest = divmod(rows, PARTS)
        return rounds * self.parts + np.bincount(self.source[:rest], minlength=len(self.parts))


row_table = lru_cache(maxsize=64)(RowTable)
"""The table of some parts, which are the same in every segment of a stage."""


@dataclass(frozen=True)
class Stage:
    """Shares of the sources from a row on: whole parts of PARTS, one a source."""

    first_row: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Budgets:
    """Rows that each source has, None: without end; and whether training stops with the first that runs out."""

    rows: tuple[int | None, ...]
    stop: bool = False


@dataclass(frozen=True)
class _Segment:
    """Rows of fixed shares: the first, its table, and the rows of each source before it."""

    first: int
    table: RowTable
    before: Ints


class MixtureSchedule:
    """Maps rows of training to sources and to rows of these sources. ``end``: rows there are in all."""

    def __init__(self, stages: Sequence[Stage], budgets: Budgets) -> None:
        self.sources = len(budgets.rows)
        self.end = ENDLESS
        self.exhausted: list[tuple[int, int]] = []
        """(row, source): the sources that run out, with the number of the row after their last one."""
        self._segments: list[_Segment] = []
        left = list(budgets.rows)
        # A stage that changes nothing begins no segment: rows depend on the shares alone, however they are written.
        stages = [*stages[:1], *(stage for last, stage in pairwise(stages) if last.parts != stage.parts)]
        ends = [stage.first_row for stage in stages[1:]] + [ENDLESS]
        for stage, end in zip(stages, ends, strict=True):
            if self.end == ENDLESS:
                self._add_stage(stage, end, left, budgets)
        self._firsts = np.array([segment.first for segment in self._segments] or [0], np.int64)

    def _add_stage(self, stage: Stage, end: int, left: list[int | None], budgets: Budgets) -> None:
        """Append the segments of a stage; ``left``, the rows that sources still have, is brought up to its end."""
        row = stage.first_row
        while row < end:
            parts = [part if left[k] != 0 else 0 for k, part in enumerate(stage.parts)]
            if not any(parts):
                self.end = row
                return
            table = row_table(parts_of(parts, [str(k) for k in range(len(parts))]))
            limited = [(table.row_of(k, rows - 1), k) for k, rows in enumerate(left) if rows and parts[k]]
            last, source = min(limited, default=(ENDLESS, -1))
            stop = min(row + last + 1, end)
            before = self._counts_at(row)
            self._segments.append(_Segment(row, table, before))
            for k, count in enumerate(table.counts(stop - row).tolist() if stop < ENDLESS else []):
                rows = left[k]
                left[k] = None if rows is None else rows - count
            if source >= 0 and stop == row + last + 1:
                self.exhausted.append((stop, source))
                if budgets.stop:
                    self.end = stop
                    return
            row = stop

    def _counts_at(self, row: int) -> Ints:
        if not self._segments:
            return np.zeros(self.sources, np.int64)
        last = self._segments[-1]
        return last.before + last.table.counts(row - last.first)

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """(source, number of the row in that source) of rows of training; source -1 for rows beyond the end."""
        source, number = np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.int64)
        segment = np.where(rows < self.end, np.searchsorted(self._firsts, rows, side="right") - 1, -1)
        for index in np.unique(segment[segment >= 0]).tolist():
            here, which = np.flatnonzero(segment == index), self._segments[index]
            rounds, place = np.divmod(rows[here] - which.first, PARTS)
            found = which.table.source[place]
            source[here] = found
            number[here] = which.before[found] + rounds * which.table.parts[found] + which.table.before[place]
        return source, number

    def counts(self, row: int) -> Ints:
        """Rows of each source, (sources,), among the first ``row`` rows of training."""
        row = min(row, self.end)
        index = int(np.searchsorted(self._firsts, row, side="right")) - 1
        if not self._segments:
            return np.zeros(self.sources, np.int64)
        segment = self._segments[index]
        return segment.before + segment.table.counts(row - segment.first)


def same_until(ours: Sequence[Stage], theirs: Sequence[Stage], row: int) -> bool:
    """Whether two sequences of stages give the same shares to every row before ``row``."""
    firsts = sorted({stage.first_row for stage in (*ours, *theirs) if stage.first_row < row})
    return all(_parts_at(ours, first) == _parts_at(theirs, first) for first in firsts)


def _parts_at(stages: Sequence[Stage], row: int) -> tuple[int, ...]:
    later = (stage for stage, after in pairwise([*stages, None]) if after is None or row < after.first_row)
    found = next(later)
    assert found is not None
    return found.parts
