"""Streams and steps: which rows make up the global batch of a step, for any number of ranks.

The units of an epoch (``epoch_order``) are cut into S equal ranges, the *streams*; their sizes differ by one unit at
most. All streams advance together, so one number says how far an epoch has come:

    step at Cursor(epoch, p), k = global batch / S, u = seq_len where rows are packed, else 1
    row j (0 <= j < k S) = stream j mod S, its units [p + (j div S) u, p + (j div S + 1) u)
    after it: p + k u; once that is past the longest stream, Cursor(epoch + 1, 0)

A row that reaches beyond the end of its stream is padded. So every unit comes exactly once an epoch, and any cursor is
reached by arithmetic. A ramp of the batch size cuts the run into stages, each with its own k from the cursor
on at which it begins: so the cursor alone says how large its step is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np

from train.data.sampling.epoch_order import DocSpans, EpochOrder, Ints
from train.errors import UserError


@dataclass(frozen=True)
class Cursor:
    """Position of training in its data: the epoch, and the units that each stream has given in it."""

    epoch: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain values for a checkpoint's manifest."""
        return asdict(self)

    @staticmethod
    def from_dict(state: dict[str, int]) -> Cursor:
        """The cursor that ``to_dict`` was called on."""
        return Cursor(epoch=int(state["epoch"]), position=int(state["position"]))


@dataclass(frozen=True)
class StepShape:
    """Rows of an optimizer step (global batch), tokens of a row, streams of an epoch, whether rows are packed."""

    rows: int
    seq_len: int
    streams: int
    pack: bool = True
    ramp: tuple[tuple[int, int], ...] = ()
    """What comes before steps of ``rows`` rows: (rows, steps) after (rows, steps)."""


class StepPlan(ABC):
    """Maps a cursor to the spans of documents that fill each row of the global batch."""

    def __init__(self, shape: StepShape) -> None:
        for rows in (shape.rows, *(rows for rows, _ in shape.ramp)):
            if rows % shape.streams:
                raise UserError(
                    f"batch.global={rows} is not a multiple of data.streams={shape.streams}: every stream gives the "
                    f"same number of rows to a step. Set data.streams to a divisor of {rows}, or leave it out"
                )
        self.shape = shape
        # Where each stage of the ramp begins, and the rows that each stream gives to its steps.
        self._stages: list[tuple[Cursor, int]] = []
        begin = Cursor()
        for rows, steps in shape.ramp:
            self._stages.append((begin, rows // shape.streams))
            begin = self.after(begin, steps)
        self._stages.append((begin, shape.rows // shape.streams))

    @property
    def full_size(self) -> Cursor:
        """The first cursor whose step has all of ``shape.rows``."""
        return self._stages[-1][0]

    def rows_per_stream(self, cursor: Cursor) -> int:
        """Rows that each stream gives to the step at the cursor."""
        return self._stages[self._stage(cursor)][1]

    def _stage(self, cursor: Cursor) -> int:
        """The number of the stage that the step at the cursor belongs to: the last that begins there or before."""
        begins = [(begin.epoch, begin.position) for begin, _ in self._stages]
        return bisect_right(begins, (cursor.epoch, cursor.position)) - 1

    def _position_before_stage(self, cursor: Cursor, end: int) -> int:
        """The position at which steps of the cursor's size end: where another stage begins, else ``end``."""
        following = self._stages[self._stage(cursor) + 1 :]
        return following[0][0].position if following and following[0][0].epoch == cursor.epoch else end

    @abstractmethod
    def after(self, cursor: Cursor, steps: int = 1) -> Cursor:
        """The cursor ``steps`` optimizer steps later, in a later epoch if need be."""

    @abstractmethod
    def steps_left(self, cursor: Cursor) -> int:
        """Steps from the cursor to the end of its epoch, the last of which may be short, or to another batch size."""

    @abstractmethod
    def check_cursor(self, cursor: Cursor) -> None:
        """Raise UserError unless the cursor lies inside an epoch of this plan."""

    @abstractmethod
    def row_spans(self, streams: Iterable[int], cursor: Cursor, steps: int, keep: bool = True) -> DocSpans:
        """Spans of the rows of ``steps`` <= steps_left steps from a cursor: stream after stream, step after step.

        Each stream gives rows_per_stream(cursor) * steps rows. Spans are cut where rows of seq_len tokens end; padding
        (sample -1) fills the rest of a row. ``keep``: see ``EpochOrder.spans``.
        """

    @abstractmethod
    def progress(self, before: Cursor, after: Cursor) -> dict[str, float]:
        """Numbers for the record of the step from ``before`` to ``after``: how far the data have been read."""

    def source_totals(self, cursor: Cursor) -> dict[str, float]:
        """Tokens and epochs read of each source of a mixture before a cursor; empty without a mixture."""
        return {}

    def row_sources(self, cursor: Cursor) -> Ints | None:
        """The number, from 1, of each row's source in the step at a cursor, (rows,); None without a mixture."""
        return None

    def step_table(self, cursor: Cursor, skipped: Collection[int] = ()) -> Ints:
        """Spans of the step at the cursor, (spans, 4): row, sample, start, length; by row, without ``skipped`` rows.

        It looks at all streams, of which a loader reads its rank's: the loader's windows stay in the cache.
        """
        spans = self.row_spans(range(self.shape.streams), cursor, 1, keep=False)
        # Spans come stream after stream: row ``i`` of ``stream`` is row i * streams + stream of the step.
        index = (np.cumsum(spans.length) - 1) // self.shape.seq_len
        each = self.rows_per_stream(cursor)
        row = index % each * self.shape.streams + index // each
        real = np.flatnonzero((spans.sample >= 0) & ~np.isin(row, list(skipped)))
        real = real[np.argsort(row[real], kind="stable")]
        return np.stack([row[real], *(column[real] for column in spans)], axis=1)

    def data_hash(self, cursor: Cursor, skipped: Collection[int] = ()) -> str:
        """16 hex digits over ``step_table``: equal only for steps that train on the same spans in the same rows."""
        return blake2b(self.step_table(cursor, skipped).astype("<i8").tobytes(), digest_size=8).hexdigest()


class BatchPlan(StepPlan):
    """The plan of one corpus: see the head of this module."""

    def __init__(self, order: EpochOrder, shape: StepShape) -> None:
        self.order = order
        self._units_per_row = shape.seq_len if shape.pack else 1
        self._longest_stream = -(-order.units // shape.streams)
        if not order.units:
            raise UserError("nothing to train on: this split of the corpus holds no documents")
        super().__init__(shape)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch, the last of which may be short."""
        cursor, steps = Cursor(), 0
        while cursor.epoch == 0:
            left = self.steps_left(cursor)
            cursor, steps = self.after(cursor, left), steps + left
        return steps

    def after(self, cursor: Cursor, steps: int = 1) -> Cursor:
        """Implements ``StepPlan.after``: streams end together, and then the next epoch begins."""
        while steps:
            made = min(steps, self.steps_left(cursor))
            position = cursor.position + made * self._units_per_step(cursor)
            over = position >= self._longest_stream
            cursor, steps = Cursor(cursor.epoch + 1) if over else Cursor(cursor.epoch, position), steps - made
        return cursor

    def steps_left(self, cursor: Cursor) -> int:
        """Implements ``StepPlan.steps_left``: as many as the longest stream has."""
        end = self._position_before_stage(cursor, self._longest_stream)
        return -(-(end - cursor.position) // self._units_per_step(cursor))

    def _units_per_step(self, cursor: Cursor) -> int:
        """Units of one stream in the step at the cursor."""
        return self.rows_per_stream(cursor) * self._units_per_row

    def progress(self, before: Cursor, after: Cursor) -> dict[str, float]:
        """Implements ``StepPlan.progress``: the epoch that the step was read in."""
        return {"epoch": before.epoch}

    def check_cursor(self, cursor: Cursor) -> None:
        """Implements ``StepPlan.check_cursor`` for the positions of the longest stream."""
        if cursor.epoch < 0 or not 0 <= cursor.position < self._longest_stream:
            raise UserError(
                f"the saved data position (epoch {cursor.epoch}, {cursor.position}) does not lie in an epoch of "
                f"{self.shape.streams} streams of {self._longest_stream} "
                f"{'tokens' if self.shape.pack else 'documents'}: "
                "resume with the data.streams, data.pack and corpus of the run that saved it"
            )

    def row_spans(self, streams: Iterable[int], cursor: Cursor, steps: int, keep: bool = True) -> DocSpans:
        """Implements ``StepPlan.row_spans``: a stream's range of the epoch, cut where rows end."""
        number = np.fromiter(streams, np.int64)
        low, high = (self.order.units * n // self.shape.streams for n in (number, number + 1))
        begins = np.minimum(low + cursor.position, high)
        ends = np.minimum(begins + steps * self._units_per_step(cursor), high)
        spans, owner = self.order.spans(cursor.epoch, begins, ends, keep)
        rows = steps * self.rows_per_stream(cursor)
        if not self.shape.pack:
            row = owner * rows + np.arange(len(owner)) - np.searchsorted(owner, owner)
            return one_sample_per_row(spans, row, rows * len(number), self.shape.seq_len)
        missing = rows * self.shape.seq_len - (ends - begins)
        short = np.flatnonzero(missing)
        if len(short):
            behind = np.searchsorted(owner, short, side="right")
            padding = (-1, 0, missing[short])
            spans = DocSpans(*(np.insert(column, behind, value) for column, value in zip(spans, padding, strict=True)))
        return _cut_at_rows(spans, self.shape.seq_len)


def _cut_at_rows(spans: DocSpans, seq_len: int) -> DocSpans:
    """Cut spans, which fill whole rows end to end, at every border between rows."""
    begins = np.cumsum(spans.length) - spans.length
    borders = np.arange(0, int(spans.length.sum()), seq_len)
    # Both arrays are ascending; a border where a span begins needs no cut.
    at_border = np.searchsorted(begins, borders, side="right") - 1
    needs_cut = begins[at_border] != borders
    points = np.sort(np.concatenate([begins, borders[needs_cut]]))
    origin = np.searchsorted(begins, points, side="right") - 1
    sample = spans.sample[origin]
    start = spans.start[origin] + points - begins[origin]
    start[sample < 0] = 0
    length = np.empty_like(points)
    length[:-1] = points[1:] - points[:-1]
    length[-1:] = borders[-1:] + seq_len - points[-1:]
    return DocSpans(sample, start, length)


def one_sample_per_row(spans: DocSpans, row: Ints, rows: int, seq_len: int) -> DocSpans:
    """Put each sample in its ``row``, truncated to seq_len; pad short rows and rows without a sample."""
    sample = np.full((rows, 2), -1, np.int64)
    length = np.zeros((rows, 2), np.int64)
    sample[row, 0] = spans.sample
    length[row, 0] = np.minimum(spans.length, seq_len)
    length[:, 1] = seq_len - length[:, 0]
    keep = length.ravel() > 0
    return DocSpans(sample.ravel()[keep], np.zeros(int(keep.sum()), np.int64), length.ravel()[keep])
