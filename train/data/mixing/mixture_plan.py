"""Streams and steps of a mixture: rows of all sources in the order of a schedule.

Rows are numbered over the whole training: the cursor is Cursor(0, n), n the rows read before, and row j of the step
there is row n + j. The schedule says which source it comes from, and which row of that source it is. So a global batch
is a function of the step alone, whatever reads it, and no state of a source is kept.

Samples of all sources have one numbering, and those of a later epoch of a source others than those of an earlier one,
so that what is drawn by sample (masks, spans) is drawn anew:

    sample = first number of the source + number in the source + epoch of the source * samples of all sources
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from train.data.mixing.mixture_schedule import ENDLESS, MixtureSchedule
from train.data.mixing.source_rows import SourceRows
from train.data.sampling.batch_plan import Cursor, StepPlan, StepShape, one_sample_per_row
from train.data.sampling.epoch_order import DocSpans, Ints, concat_spans, take_spans
from train.errors import UserError


@dataclass(frozen=True)
class MixtureSources:
    """Names of the sources, and the number of each one's first sample, then of all samples: (sources + 1,)."""

    names: tuple[str, ...]
    first_samples: Ints


class MixturePlan(StepPlan):
    """Maps a cursor to the spans of documents of several sources."""

    def __init__(
        self, rows: Sequence[SourceRows], schedule: MixtureSchedule, sources: MixtureSources, shape: StepShape
    ) -> None:
        self.source_rows, self.schedule, self.names = list(rows), schedule, sources.names
        self._first_samples = sources.first_samples
        super().__init__(shape)

    @property
    def steps(self) -> int | None:
        """Optimizer steps that the sources last, the last of which may be short; None: without end."""
        if self.schedule.end == ENDLESS:
            return None
        cursor, steps = Cursor(), 0
        while cursor.position < self.schedule.end:
            end = min(self.schedule.end, self._position_before_stage(cursor, ENDLESS))
            made = -(-(end - cursor.position) // self._rows(cursor))
            cursor, steps = self.after(cursor, made), steps + made
        return steps

    def _rows(self, cursor: Cursor) -> int:
        """Rows of the step at a cursor."""
        return self.rows_per_stream(cursor) * self.shape.streams

    def after(self, cursor: Cursor, steps: int = 1) -> Cursor:
        """Implements ``StepPlan.after``: the rows of these steps are read."""
        while steps:
            made = min(steps, self.steps_left(cursor))
            cursor, steps = Cursor(0, cursor.position + made * self._rows(cursor)), steps - made
        return cursor

    def steps_left(self, cursor: Cursor) -> int:
        """Implements ``StepPlan.steps_left``: a mixture is one epoch, whose sources begin theirs when they must."""
        end = self._position_before_stage(cursor, ENDLESS)
        return -(-(end - cursor.position) // self._rows(cursor))

    def check_cursor(self, cursor: Cursor) -> None:
        """Implements ``StepPlan.check_cursor``: the position is a number of whole steps."""
        begin = self._stages[max(self._stage(cursor), 0)][0].position
        if cursor.epoch or cursor.position < 0 or (cursor.position - begin) % self._rows(cursor):
            raise UserError(
                f"the saved data position (epoch {cursor.epoch}, {cursor.position}) is not one of a mixture of "
                f"{self.shape.rows} rows a step: resume with the batch.global and the data of the run that saved it"
            )

    def row_spans(self, streams: Iterable[int], cursor: Cursor, steps: int, keep: bool = True) -> DocSpans:
        """Implements ``StepPlan.row_spans`` for rows of any sources beside each other."""
        stream, step = np.fromiter(streams, np.int64), np.arange(steps)
        turn = np.arange(self.rows_per_stream(cursor))
        rows = stream[:, None, None] + step[:, None] * self._rows(cursor) + turn * self.shape.streams
        return self._spans_of_rows(cursor.position + rows.ravel(), keep)

    def _spans_of_rows(self, rows: Ints, keep: bool) -> DocSpans:
        source, number = self.schedule.locate(rows)
        parts, owners = [DocSpans(*(np.zeros(0, np.int64) for _ in range(3)))], [np.zeros(0, np.int64)]
        for k in np.unique(source[source >= 0]).tolist():
            mine = np.flatnonzero(source == k)
            spans, owner, epoch = self.source_rows[k].spans(number[mine], keep)
            parts.append(spans._replace(sample=spans.sample + self._first_samples[k] + epoch * self._first_samples[-1]))
            owners.append(mine[owner])
        owner = np.concatenate(owners)
        by_row = np.argsort(owner, kind="stable")
        spans, owner = take_spans(concat_spans(parts), by_row), owner[by_row]
        if not self.shape.pack:
            return one_sample_per_row(spans, owner, len(rows), self.shape.seq_len)
        filled = np.bincount(owner, weights=spans.length, minlength=len(rows)).astype(np.int64)
        short = np.flatnonzero(filled < self.shape.seq_len)
        behind = np.searchsorted(owner, short, side="right")
        none = np.zeros(len(short), np.int64)
        padding = DocSpans(none - 1, none, self.shape.seq_len - filled[short])
        return DocSpans(*(np.insert(column, behind, value) for column, value in zip(spans, padding, strict=True)))

    def row_sources(self, cursor: Cursor) -> Ints:
        """Implements ``StepPlan.row_sources``: as the schedule says."""
        return self.schedule.locate(cursor.position + np.arange(self._rows(cursor)))[0] + 1

    def progress(self, before: Cursor, after: Cursor) -> dict[str, float]:
        """Implements ``StepPlan.progress``: the totals of the sources."""
        return self.source_totals(after)

    def source_totals(self, cursor: Cursor) -> dict[str, float]:
        """Implements ``StepPlan.source_totals``: tokens read of each source, and epochs of it, in parts of one too."""
        numbers: dict[str, float] = {}
        for name, rows, count in zip(self.names, self.source_rows, self.schedule.counts(cursor.position), strict=True):
            units = int(count) * rows.row_units
            units = units if rows.limit is None else min(units, rows.limit)
            numbers |= {f"tokens/{name}": units} if self.shape.pack else {f"documents/{name}": units}
            numbers[f"epochs/{name}"] = round(units / rows.order.units, 6)
        return numbers
