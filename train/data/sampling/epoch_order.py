"""The order of an epoch: arithmetic only, the same on every rank and for any number of ranks.

An epoch is one sequence. Its shards come in an order drawn from (seed, epoch); every ``window`` shards in a row form a
window, and the samples of a window are permuted among themselves. The sequence is a line of *units*: the places of the
samples where rows are packed, the samples themselves where a row is one document.

Any unit is reached by two binary searches; a window is permuted when it is first touched. Permutations are our own
(hashes, sorted): no library's generator, which may change with its version, decides what a resumed run reads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.ma  # np.unique's, which is better loaded before a warm process forks than by every trainer
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CACHE_BYTES = 256 << 20
"""Memory for permuted windows: enough for those of all streams of any usual corpus."""


class DocSpans(NamedTuple):
    """Consecutive parts of documents: of ``sample``, ``length`` places from place ``start``. A sample -1 is padding."""

    sample: Ints
    start: Ints
    length: Ints


_NO_SPANS = DocSpans(*(np.zeros(0, np.int64) for _ in range(3)))


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers that looks random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_key(*numbers: int) -> int:
    """One 64-bit key of several numbers, in their order."""
    key = 0
    for number in numbers:
        key = int(splitmix64(np.array([(key ^ (number & _MASK)) + _GOLDEN & _MASK], np.uint64))[0])
    return key


def permutation(ids: Ints, key: int) -> Ints:
    """An order of 0 .. len(ids) - 1, drawn by hashing each id with the key.

    The low bits of each hash are replaced by the index, so that no two are equal and plain sorting is enough.
    """
    bits = np.uint64(max(len(ids) - 1, 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    hashes = splitmix64(ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    return (np.sort((hashes & ~low) | np.arange(len(ids), dtype=np.uint64)) & low).astype(np.int64)


@dataclass(frozen=True)
class SplitSizes:
    """What the order must know of a split: per shard its samples and places, per sample its places."""

    shard_samples: Ints
    shard_tokens: Ints
    sample_tokens: Ints


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is permuted; ``window`` in shards. A window of 0 leaves everything in the order of storage."""

    seed: int
    window: int


class EpochOrder:
    """The line of units of every epoch, and the pieces of any stretch of it. Several threads may use it."""

    def __init__(self, layout: SplitSizes, shuffle: Shuffle, pack: bool) -> None:
        self._sizes = layout
        self._shuffle = shuffle
        self._pack = pack
        self._first = np.concatenate([[0], np.cumsum(layout.shard_samples)]).astype(np.int64)
        self._shard_units = layout.shard_tokens if pack else layout.shard_samples
        self.units = int(self._shard_units.sum())
        self._lock = threading.Lock()
        self._epoch: tuple[int, Ints, Ints] | None = None
        self._windows: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()
        self._cached = 0

    def spans(self, epoch: int, begins: Ints, ends: Ints) -> tuple[DocSpans, Ints]:
        """The pieces of units [begins[i], ends[i]) of an epoch, one stretch after the other, and the i of each piece.

        A piece of an unpacked order is a whole sample.
        """
        with self._lock:
            _, borders = self._shard_order(epoch)
            # Cut the stretches where windows end, then serve all that lie in a window at once.
            first = np.searchsorted(borders, begins, side="right") - 1
            last = np.searchsorted(borders, ends, side="left") - 1
            which, window = _expand_ranges(first, np.where(begins < ends, last - first + 1, 0))
            low = np.maximum(begins[which], borders[window]) - borders[window]
            high = np.minimum(ends[which], borders[window + 1]) - borders[window]
            parts, owners = [_NO_SPANS], [np.zeros(0, np.int64)]
            for number in np.unique(window).tolist():
                inside = np.flatnonzero(window == number)
                pieces, owner = self._spans_in_window(epoch, number, low[inside], high[inside])
                parts.append(pieces)
                owners.append(inside[owner])
        cut = np.concatenate(owners)
        pieces = _concat_spans(parts)
        if len(parts) > 2:
            sort = np.argsort(cut, kind="stable")
            cut, pieces = cut[sort], take_spans(pieces, sort)
        return pieces, which[cut]

    def _spans_in_window(self, epoch: int, window: int, begins: Ints, ends: Ints) -> tuple[DocSpans, Ints]:
        """As ``stretches``, for stretches that lie in one window, counted from its start; none is empty."""
        samples, sums = self._samples_of_window(epoch, window)
        first = np.searchsorted(sums, begins, side="right")
        last = np.searchsorted(sums, ends, side="left")
        owner, at = _expand_ranges(first, last - first + 1)
        sample = samples[at]
        length = self._sizes.sample_tokens[sample]
        start = np.zeros_like(sample)
        if self._pack:
            stop = np.cumsum(last - first + 1)
            head = np.append(0, stop[:-1])
            start[head] = begins - (sums[first] - length[head])
            length[stop - 1] -= sums[last] - ends
            length[head] -= start[head]
        return DocSpans(sample, start, length), owner

    def _shard_order(self, epoch: int) -> tuple[Ints, Ints]:
        """The shards of an epoch in order, and the units before each of its windows (and in all)."""
        if self._epoch is None or self._epoch[0] != epoch:
            numbers = np.arange(len(self._shard_units), dtype=np.int64)
            step = self._shuffle.window or len(numbers)
            if self._shuffle.window:
                numbers = permutation(numbers, hash_key(self._shuffle.seed, epoch, 0))
            before = np.concatenate([[0], np.cumsum(self._shard_units[numbers])])
            borders = np.append(before[0:-1:step], before[-1]).astype(np.int64)
            self._epoch = epoch, numbers, borders
        return self._epoch[1], self._epoch[2]

    def _samples_of_window(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """Of a window: its samples in order, and the units up to the end of each. The least used are forgotten."""
        found = self._windows.get((epoch, window))
        if found is not None:
            self._windows.move_to_end((epoch, window))
            return found
        shards, _ = self._shard_order(epoch)
        step = self._shuffle.window or len(shards)
        chosen = shards[window * step : (window + 1) * step]
        samples = np.concatenate([np.arange(self._first[n], self._first[n + 1]) for n in chosen])
        if self._shuffle.window:
            samples = samples[permutation(samples, hash_key(self._shuffle.seed, epoch, 1))]
        ends = np.cumsum(self._sizes.sample_tokens[samples]) if self._pack else np.arange(1, len(samples) + 1)
        self._windows[epoch, window] = samples, ends
        self._cached += samples.nbytes + ends.nbytes
        while self._cached > _CACHE_BYTES and len(self._windows) > 1:
            old = self._windows.popitem(last=False)[1]
            self._cached -= old[0].nbytes + old[1].nbytes
        return samples, ends


def _concat_spans(parts: list[DocSpans]) -> DocSpans:
    return DocSpans(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def take_spans(pieces: DocSpans, which: Ints) -> DocSpans:
    """Some pieces, in another order."""
    return DocSpans(*(column[which] for column in pieces))


def _expand_ranges(first: Ints, count: Ints) -> tuple[Ints, Ints]:
    """The numbers first[i], first[i] + 1, ... (count[i] of them), one range after the other, and the i of each."""
    owner = np.repeat(np.arange(len(first)), count)
    before = np.cumsum(count) - count
    return owner, np.arange(len(owner)) + (first - before)[owner]
