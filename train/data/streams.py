"""The global order of training data: arithmetic only, the same on every rank and for any number of ranks.

An epoch is one sequence. Its shards come in an order drawn from (seed, epoch); every ``window`` shards in a row form a window, and
the samples of a window are permuted among themselves. The sequence is a line of *units*: the places of the samples where rows are
packed, the samples themselves where a row is one document. The line is cut into S ranges of equal units (they differ by one at most): the
streams. All streams advance together, so that one number tells where an epoch stands:

    step at Cursor(epoch, p), k = global batch / S, u = T packed, 1 else
    row j (0 <= j < k S) = stream j mod S, its units [p + (j div S) u, p + (j div S + 1) u)
    after it: p + k u; once that is past the longest stream, Cursor(epoch + 1, 0)

What a row has beyond the end of its stream is padding, so every place comes exactly once an epoch. Any position is reached by two
binary searches; a window is permuted when it is first touched. Permutations are our own (hashes, sorted): no library's
generator, which may change with its version, decides what a resumed run reads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError

Ints = NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CACHE_BYTES = 256 << 20
"""Memory for permuted windows: those of all streams of any usual corpus."""


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


class Pieces(NamedTuple):
    """Consecutive parts of documents: of ``sample``, ``length`` places from place ``start``. A sample -1 is padding."""

    sample: Ints
    start: Ints
    length: Ints


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers that looks random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """One 64-bit key of several numbers, in their order."""
    key = 0
    for number in numbers:
        key = int(mix(np.array([(key ^ (number & _MASK)) + _GOLDEN & _MASK], np.uint64))[0])
    return key


def permutation(ids: Ints, key: int) -> Ints:
    """An order of 0 .. len(ids) - 1, drawn by hashing each id with the key.

    The low bits of each hash are replaced by the index, so that no two are equal and plain sorting is enough.
    """
    bits = np.uint64(max(len(ids) - 1, 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    hashes = mix(ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    return (np.sort((hashes & ~low) | np.arange(len(ids), dtype=np.uint64)) & low).astype(np.int64)


@dataclass(frozen=True)
class Layout:
    """What the order must know of a split: per shard its samples and places, per sample its places."""

    shard_samples: Ints
    shard_tokens: Ints
    sizes: Ints


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is permuted; ``window`` in shards. A window of 0 leaves everything in the order of storage."""

    seed: int
    window: int


class Order:
    """The line of units of every epoch, and the pieces that any stretch of it consists of. Safe to use from several threads."""

    def __init__(self, layout: Layout, shuffle: Shuffle, pack: bool) -> None:
        self._layout = layout
        self._shuffle = shuffle
        self._pack = pack
        self._first = np.concatenate([[0], np.cumsum(layout.shard_samples)]).astype(np.int64)
        self._shard_units = layout.shard_tokens if pack else layout.shard_samples
        self.units = int(self._shard_units.sum())
        self._lock = threading.Lock()
        self._epoch: tuple[int, Ints, Ints] | None = None
        self._windows: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()
        self._cached = 0

    def stretch(self, epoch: int, begin: int, end: int) -> Pieces:
        """The pieces of units [begin, end) of an epoch. A piece of an unpacked order is a whole sample."""
        with self._lock:
            _, borders = self._shards_of(epoch)
            parts = []
            window = int(np.searchsorted(borders, begin, side="right")) - 1
            while begin < end:
                stop = min(end, int(borders[window + 1]))
                parts.append(self._inside(epoch, window, begin - int(borders[window]), stop - int(borders[window])))
                begin, window = max(begin, stop), window + 1
        if len(parts) == 1:
            return parts[0]
        empty = np.zeros(0, np.int64)
        return (
            Pieces(*(np.concatenate([empty, *columns]) for columns in zip(*parts, strict=True)))
            if parts
            else Pieces(empty, empty, empty)
        )

    def _inside(self, epoch: int, window: int, begin: int, end: int) -> Pieces:
        """As ``stretch``, for units counted from the start of a window and inside it."""
        samples, ends = self._window(epoch, window)
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        sample = samples[first : last + 1]
        size = self._layout.sizes[sample]
        if not self._pack:
            return Pieces(sample, np.zeros_like(sample), size)
        start = np.zeros_like(sample)
        length = size.copy()
        start[0] = begin - (int(ends[first]) - int(size[0]))
        length[-1] -= int(ends[last]) - end
        length[0] -= start[0]
        return Pieces(sample, start, length)

    def _shards_of(self, epoch: int) -> tuple[Ints, Ints]:
        """The shards of an epoch in order, and the units before each of its windows (and in all)."""
        if self._epoch is None or self._epoch[0] != epoch:
            numbers = np.arange(len(self._shard_units), dtype=np.int64)
            step = self._shuffle.window or len(numbers)
            if self._shuffle.window:
                numbers = permutation(numbers, key_of(self._shuffle.seed, epoch, 0))
            before = np.concatenate([[0], np.cumsum(self._shard_units[numbers])])
            borders = np.append(before[0:-1:step], before[-1]).astype(np.int64)
            self._epoch = epoch, numbers, borders
        return self._epoch[1], self._epoch[2]

    def _window(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """Of a window: its samples in order, and the units up to the end of each. The least used are forgotten."""
        found = self._windows.get((epoch, window))
        if found is not None:
            self._windows.move_to_end((epoch, window))
            return found
        shards, _ = self._shards_of(epoch)
        step = self._shuffle.window or len(shards)
        chosen = shards[window * step : (window + 1) * step]
        samples = np.concatenate([np.arange(self._first[n], self._first[n + 1]) for n in chosen])
        if self._shuffle.window:
            samples = samples[permutation(samples, key_of(self._shuffle.seed, epoch, 1))]
        ends = np.cumsum(self._layout.sizes[samples]) if self._pack else np.arange(1, len(samples) + 1)
        self._windows[epoch, window] = samples, ends
        self._cached += samples.nbytes + ends.nbytes
        while self._cached > _CACHE_BYTES and len(self._windows) > 1:
            old = self._windows.popitem(last=False)[1]
            self._cached -= old[0].nbytes + old[1].nbytes
        return samples, ends


@dataclass(frozen=True)
class Shape:
    """Rows of an optimizer step, places of a row, streams of an epoch, and whether rows are packed."""

    rows: int
    seq_len: int
    streams: int
    pack: bool = True


class Plan:
    """Which places of which samples stand in which row of which step."""

    def __init__(self, order: Order, shape: Shape) -> None:
        if shape.rows % shape.streams:
            raise UserError(
                f"batch.global={shape.rows} is not a multiple of data.streams={shape.streams}: every stream gives the same number of "
                f"rows to a step. Set data.streams to a divisor of {shape.rows}, or leave it out"
            )
        self.order = order
        self.shape = shape
        self.depth = shape.rows // shape.streams  # rows of a stream in a step
        self._unit = shape.seq_len if shape.pack else 1  # units of a row
        self._stride = self.depth * self._unit  # units that a stream gives to a step
        self._longest = -(-order.units // shape.streams)
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
        return Cursor(cursor.epoch, cursor.position + steps * self._stride)

    def steps_left(self, cursor: Cursor) -> int:
        """Steps from the cursor to the end of its epoch, the last of which may be short."""
        return -(-(self._longest - cursor.position) // self._stride)

    def check(self, cursor: Cursor) -> None:
        """Raise UserError unless the cursor lies inside an epoch of this plan."""
        if cursor.epoch < 0 or not 0 <= cursor.position < self._longest:
            raise UserError(
                f"the saved data position (epoch {cursor.epoch}, {cursor.position}) does not lie in an epoch of "
                f"{self.shape.streams} streams of {self._longest} {'tokens' if self.shape.pack else 'documents'}: resume with the "
                "data.streams, data.pack and corpus of the run that saved it"
            )

    def stream(self, stream: int, cursor: Cursor, steps: int) -> Pieces:
        """Rows of one stream in ``steps`` steps of the cursor's epoch: pieces that tile steps * depth rows of seq_len places.

        Pieces are cut where rows end; padding (sample -1) fills what the stream does not.
        """
        low, high = (self.order.units * number // self.shape.streams for number in (stream, stream + 1))
        rows = steps * self.depth
        begin = min(low + cursor.position, high)
        end = min(begin + rows * self._unit, high)
        pieces = self.order.stretch(cursor.epoch, begin, end)
        if self.shape.pack:
            return _cut(pieces, rows, self.shape.seq_len)
        return _one_a_row(pieces, rows, self.shape.seq_len)

    def data_hash(self, cursor: Cursor) -> str:
        """A hash of what the step at the cursor trains on: per row its pieces (sample, start, length). 16 hex digits."""
        table = []
        for stream in range(self.shape.streams):
            pieces = self.stream(stream, cursor, 1)
            row = (np.cumsum(pieces.length) - 1) // self.shape.seq_len * self.shape.streams + stream
            real = pieces.sample >= 0
            table.append(np.stack([row[real], *(column[real] for column in pieces)], axis=1))
        rows = np.concatenate(table)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return blake2b(rows.astype("<i8").tobytes(), digest_size=8).hexdigest()


def _cut(pieces: Pieces, rows: int, seq_len: int) -> Pieces:
    """The pieces laid into rows end to end: cut at every border of rows, the rest of the last rows padding."""
    total, used = rows * seq_len, int(pieces.length.sum())
    begins = np.cumsum(pieces.length) - pieces.length
    sample, start = pieces.sample, pieces.start
    if used < total:
        sample, start, begins = np.append(sample, -1), np.append(start, 0), np.append(begins, used)
    # Both lists rise; a border that coincides with a piece's begin is not a cut.
    cuts = np.arange(0, total, seq_len)
    at = np.searchsorted(begins, cuts, side="right") - 1
    new = cuts[begins[at] != cuts]
    points = np.sort(np.concatenate([begins, new]))
    which = np.searchsorted(begins, points, side="right") - 1
    length = np.diff(points, append=total)
    return Pieces(sample[which], np.where(sample[which] < 0, 0, start[which] + points - begins[which]), length)


def _one_a_row(pieces: Pieces, rows: int, seq_len: int) -> Pieces:
    """Each sample in a row of its own, cut to it; padding behind short ones and in the rows that have none."""
    count = len(pieces.sample)
    sample = np.full((rows, 2), -1, np.int64)
    length = np.zeros((rows, 2), np.int64)
    sample[:count, 0] = pieces.sample
    length[:count, 0] = np.minimum(pieces.length, seq_len)
    length[:, 1] = seq_len - length[:, 0]
    keep = length.ravel() > 0
    sample, length = sample.ravel()[keep], length.ravel()[keep]
    return Pieces(sample, np.zeros_like(sample), length)
