"""Streams: which rows a step consists of, the same for any number of ranks.

The line of an epoch (`order`) is cut into S ranges of equal units (they differ by one at most): the streams. All
advance together, so that one number tells where an epoch stands:

    step at Cursor(epoch, p), k = global batch / S, u = seq_len where rows are packed, else 1
    row j (0 <= j < k S) = stream j mod S, its units [p + (j div S) u, p + (j div S + 1) u)
    after it: p + k u; once that is past the longest stream, Cursor(epoch + 1, 0)

What a row has beyond the end of its stream is padding, so every unit comes exactly once an epoch, and any position is
reached at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np

from train.data.sampling.epoch_order import DocSpans, EpochOrder, Ints
from train.errors import UserError


@dataclass(frozen=True)
class Cursor:
    """Where training stands in its data: the epoch, and the units that each stream has given in it."""

    epoch: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(state: dict[str, int]) -> Cursor:
        """What ``to_dict`` gave."""
        return Cursor(epoch=int(state["epoch"]), position=int(state["position"]))


@dataclass(frozen=True)
class StepShape:
    """Rows of an optimizer step, places of a row, streams of an epoch, and whether rows are packed."""

    rows: int
    seq_len: int
    streams: int
    pack: bool = True


class BatchPlan:
    """Which places of which samples stand in which row of which step."""

    def __init__(self, order: EpochOrder, shape: StepShape) -> None:
        if shape.rows % shape.streams:
            raise UserError(
                f"batch.global={shape.rows} is not a multiple of data.streams={shape.streams}: every stream gives the "
                f"same number of rows to a step. Set data.streams to a divisor of {shape.rows}, or leave it out"
            )
        self.order = order
        self.shape = shape
        self.rows_per_stream = shape.rows // shape.streams  # rows of a stream in a step
        self._units_per_row = shape.seq_len if shape.pack else 1  # units of a row
        self._units_per_step = self.rows_per_stream * self._units_per_row  # units that a stream gives to a step
        self._longest_stream = -(-order.units // shape.streams)
        if not order.units:
            raise UserError("nothing to train on: this split of the corpus holds no documents")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, the last of which may be short."""
        return self.steps_left(Cursor())

    def after(self, cursor: Cursor, steps: int = 1) -> Cursor:
        """The cursor ``steps`` further, epochs counted."""
        while steps >= (left := self.steps_left(cursor)):
            cursor, steps = Cursor(cursor.epoch + 1, 0), steps - left
        return Cursor(cursor.epoch, cursor.position + steps * self._units_per_step)

    def steps_left(self, cursor: Cursor) -> int:
        """Steps from the cursor to the end of its epoch, the last of which may be short."""
        return -(-(self._longest_stream - cursor.position) // self._units_per_step)

    def check_cursor(self, cursor: Cursor) -> None:
        """Raise UserError unless the cursor lies inside an epoch of this plan."""
        if cursor.epoch < 0 or not 0 <= cursor.position < self._longest_stream:
            raise UserError(
                f"the saved data position (epoch {cursor.epoch}, {cursor.position}) does not lie in an epoch of "
                f"{self.shape.streams} streams of {self._longest_stream} {'tokens' if self.shape.pack else 'documents'}: "
                "resume with the data.streams, data.pack and corpus of the run that saved it"
            )

    def row_spans(self, streams: Iterable[int], cursor: Cursor, steps: int) -> DocSpans:
        """Stream after stream, its rows in ``steps`` steps from a cursor (all in its epoch): depth * steps rows each.

        Pieces are cut where rows of seq_len places end; padding (sample -1) fills what the streams do not.
        """
        number = np.fromiter(streams, np.int64)
        low, high = (self.order.units * n // self.shape.streams for n in (number, number + 1))
        begins = np.minimum(low + cursor.position, high)
        ends = np.minimum(begins + steps * self._units_per_step, high)
        pieces, owner = self.order.spans(cursor.epoch, begins, ends)
        rows = steps * self.rows_per_stream
        if not self.shape.pack:
            row = owner * rows + np.arange(len(owner)) - np.searchsorted(owner, owner)
            return _one_sample_per_row(pieces, row, rows * len(number), self.shape.seq_len)
        left = rows * self.shape.seq_len - (ends - begins)
        short = np.flatnonzero(left)
        if len(short):
            behind = np.searchsorted(owner, short, side="right")
            values = (-1, 0, left[short])
            pieces = DocSpans(*(np.insert(old, behind, value) for old, value in zip(pieces, values, strict=True)))
        return _cut_at_rows(pieces, self.shape.seq_len)

    def step_table(self, cursor: Cursor, without: Collection[int] = ()) -> Ints:
        """What the step at the cursor trains on, (pieces, 4): row, sample, first place in it, places; by rows, ``without`` some."""
        pieces = self.row_spans(range(self.shape.streams), cursor, 1)
        place = (np.cumsum(pieces.length) - 1) // self.shape.seq_len  # stream * depth + i, of row i * streams + stream
        row = place % self.rows_per_stream * self.shape.streams + place // self.rows_per_stream
        real = np.flatnonzero((pieces.sample >= 0) & ~np.isin(row, list(without)))
        real = real[np.argsort(row[real], kind="stable")]
        return np.stack([row[real], *(column[real] for column in pieces)], axis=1)

    def data_hash(self, cursor: Cursor, without: Collection[int] = ()) -> str:
        """16 hex digits that tell what the step at the cursor trains on ``without`` some rows: of every row its pieces."""
        return blake2b(self.step_table(cursor, without).astype("<i8").tobytes(), digest_size=8).hexdigest()


def _cut_at_rows(pieces: DocSpans, seq_len: int) -> DocSpans:
    """Pieces that fill whole rows end to end, cut at every border of rows."""
    begins = np.cumsum(pieces.length) - pieces.length
    borders = np.arange(0, int(pieces.length.sum()), seq_len)
    # Both lists rise; a border at which a piece begins is no cut.
    piece = np.searchsorted(begins, borders, side="right") - 1
    cut = begins[piece] != borders
    points = np.sort(np.concatenate([begins, borders[cut]]))
    which = np.searchsorted(begins, points, side="right") - 1
    sample = pieces.sample[which]
    start = pieces.start[which] + points - begins[which]
    start[sample < 0] = 0
    length = np.empty_like(points)
    length[:-1] = points[1:] - points[:-1]
    length[-1:] = borders[-1:] + seq_len - points[-1:]
    return DocSpans(sample, start, length)


def _one_sample_per_row(pieces: DocSpans, row: Ints, rows: int, seq_len: int) -> DocSpans:
    """Each sample in its row, cut to it; padding behind short ones and in the rows that have none."""
    sample = np.full((rows, 2), -1, np.int64)
    length = np.zeros((rows, 2), np.int64)
    sample[row, 0] = pieces.sample
    length[row, 0] = np.minimum(pieces.length, seq_len)
    length[:, 1] = seq_len - length[:, 0]
    keep = length.ravel() > 0
    return DocSpans(sample.ravel()[keep], np.zeros(int(keep.sum()), np.int64), length.ravel()[keep])
