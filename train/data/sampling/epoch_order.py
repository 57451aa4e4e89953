"""The shuffled order of an epoch: pure arithmetic, the same on every rank and for any number of ranks.

An epoch is one sequence of *units*: tokens of documents where rows are packed, whole documents where a row holds one.
Shards are permuted by (seed, epoch); every ``window`` consecutive shards form a window, and the samples (documents) of
a window are permuted among themselves.

Two binary searches reach any unit; a window is permuted when it is first needed and cached. Permutations sort hashes of
our own: a library's generator may change with its version, and then a resumed run would read other data.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.ma  # np.unique imports it: load it once, before the fork server forks, not once in every worker
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CACHE_BYTES = 256 << 20
"""Memory for permuted windows: enough for the current windows of all streams of a usual corpus."""


class DocSpans(NamedTuple):
    """Spans of documents, (spans,) each: tokens [start, start + length) of ``sample``; sample -1 is padding."""

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
    """Hash several integers, in their order, into one 64-bit key."""
    key = 0
    for number in numbers:
        key = int(splitmix64(np.array([(key ^ (number & _MASK)) + _GOLDEN & _MASK], np.uint64))[0])
    return key


def permutation(ids: Ints, key: int) -> Ints:
    """A permutation of 0 .. len(ids) - 1: the order of the hashes of ``ids`` under ``key``.

    The low bits of each hash are replaced by the index: no two are equal, so an unstable sort is deterministic.
    """
    bits = np.uint64(max(len(ids) - 1, 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    hashes = splitmix64(ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    return (np.sort((hashes & ~low) | np.arange(len(ids), dtype=np.uint64)) & low).astype(np.int64)


@dataclass(frozen=True)
class SplitSizes:
    """Sizes of a split: samples and tokens of each shard (shards,), tokens of each sample (samples,)."""

    shard_samples: Ints
    shard_tokens: Ints
    sample_tokens: Ints


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is permuted: ``window`` is in shards, and 0 keeps the order of storage."""

    seed: int
    window: int


class EpochOrder:
    """The order of all units of every epoch, and any range of it as spans of documents. Thread-safe."""

    def __init__(self, sizes: SplitSizes, shuffle: Shuffle, pack: bool) -> None:
        self._sizes = sizes
        self._shuffle = shuffle
        self._pack = pack
        self._first_samples = np.concatenate([[0], np.cumsum(sizes.shard_samples)]).astype(np.int64)
        self._shard_units = sizes.shard_tokens if pack else sizes.shard_samples
        self.units = int(self._shard_units.sum())
        self._lock = threading.Lock()
        self._epoch: tuple[int, Ints, Ints] | None = None
        self._windows: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()
        self._cached_bytes = 0

    def spans(self, epoch: int, begins: Ints, ends: Ints, keep: bool = True) -> tuple[DocSpans, Ints]:
        """The spans of the unit ranges [begins[i], ends[i]) of an epoch, range after range, and the i of each span.

        Where rows are not packed, a span is a whole sample. Without ``keep`` no cached window makes room for another.
        """
        with self._lock:
            _, borders = self._shard_order(epoch)
            # Cut the ranges where windows end, then serve all cuts of a window together.
            first = np.searchsorted(borders, begins, side="right") - 1
            last = np.searchsorted(borders, ends, side="left") - 1
            range_of_cut, window = expand_ranges(first, np.where(begins < ends, last - first + 1, 0))
            low = np.maximum(begins[range_of_cut], borders[window]) - borders[window]
            high = np.minimum(ends[range_of_cut], borders[window + 1]) - borders[window]
            parts, owners = [_NO_SPANS], [np.zeros(0, np.int64)]
            for number in np.unique(window).tolist():
                cuts = np.flatnonzero(window == number)
                spans, owner = self._spans_in_window(epoch, number, (low[cuts], high[cuts]), keep)
                parts.append(spans)
                owners.append(cuts[owner])
        cut_of_span = np.concatenate(owners)
        spans = concat_spans(parts)
        if len(parts) > 2:
            order = np.argsort(cut_of_span, kind="stable")
            cut_of_span, spans = cut_of_span[order], take_spans(spans, order)
        return spans, range_of_cut[cut_of_span]

    def _spans_in_window(self, epoch: int, window: int, ranges: tuple[Ints, Ints], keep: bool) -> tuple[DocSpans, Ints]:
        """``spans`` of non-empty ranges (begins, ends) inside one window, in units from the window's start."""
        begins, ends = ranges
        samples, sums = self._samples_of_window(epoch, window, keep)
        first = np.searchsorted(sums, begins, side="right")
        last = np.searchsorted(sums, ends, side="left")
        owner, index = expand_ranges(first, last - first + 1)
        sample = samples[index]
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
        """The shards of an epoch in order, and the units before each of its windows, then the total."""
        if self._epoch is None or self._epoch[0] != epoch:
            numbers = np.arange(len(self._shard_units), dtype=np.int64)
            step = self._shuffle.window or len(numbers)
            if self._shuffle.window:
                numbers = permutation(numbers, hash_key(self._shuffle.seed, epoch, 0))
            before = np.concatenate([[0], np.cumsum(self._shard_units[numbers])])
            borders = np.append(before[0:-1:step], before[-1]).astype(np.int64)
            self._epoch = epoch, numbers, borders
        return self._epoch[1], self._epoch[2]

    def _samples_of_window(self, epoch: int, window: int, keep: bool) -> tuple[Ints, Ints]:
        """The samples of a window in order, and the units up to the end of each; an LRU cache, see ``spans``."""
        cached = self._windows.get((epoch, window))
        if cached is not None:
            if keep:
                self._windows.move_to_end((epoch, window))
            return cached
        shards, _ = self._shard_order(epoch)
        step = self._shuffle.window or len(shards)
        chosen = shards[window * step : (window + 1) * step]
        samples = np.concatenate([np.arange(self._first_samples[n], self._first_samples[n + 1]) for n in chosen])
        if self._shuffle.window:
            samples = samples[permutation(samples, hash_key(self._shuffle.seed, epoch, 1))]
        ends = np.cumsum(self._sizes.sample_tokens[samples]) if self._pack else np.arange(1, len(samples) + 1)
        size = samples.nbytes + ends.nbytes
        if not keep and self._cached_bytes + size > _CACHE_BYTES:
            return samples, ends
        self._windows[epoch, window] = samples, ends
        self._windows.move_to_end((epoch, window), last=keep)
        self._cached_bytes += size
        while self._cached_bytes > _CACHE_BYTES and len(self._windows) > 1:
            old = self._windows.popitem(last=False)[1]
            self._cached_bytes -= old[0].nbytes + old[1].nbytes
        return samples, ends


def concat_spans(parts: list[DocSpans]) -> DocSpans:
    """The spans of several parts, one part after another."""
    return DocSpans(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def take_spans(spans: DocSpans, which: Ints) -> DocSpans:
    """The spans at the indices ``which``, in that order."""
    return DocSpans(*(column[which] for column in spans))


def expand_ranges(first: Ints, count: Ints) -> tuple[Ints, Ints]:
    """(i of each number, numbers): first[i], first[i] + 1, ..., count[i] of them, range after range."""
    owner = np.repeat(np.arange(len(first)), count)
    before = np.cumsum(count) - count
    return owner, np.arange(len(owner)) + (first - before)[owner]
