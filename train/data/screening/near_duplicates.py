"""Near-duplicates by MinHash: documents that share about 72 % or more of their sequences of five words.

A document's signature has 112 hashes, 14 bands of 8, as datatrove's. Two documents with an equal band are compared by
all 112; a pair of similarity s has an equal band with probability 1 - (1 - s^8)^14: 0.05 at 0.5, 0.62 at 0.72, 0.92 at
0.8, 0.99 at 0.87. ``rensa`` makes the signatures, in Rust; groups are found here, band by band, from a file.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from train.data.screening.word_grams import grams, words_of
from train.util.extra_packages import import_extra

BANDS, ROWS = 14, 8
HASHES = BANDS * ROWS
_GRAM = 5
_SEED = 1
_LEAST_EQUAL = 0.65
"""Share of equal hashes from which two documents with an equal band are one. It estimates the similarity with a
deviation of 0.04 to 0.05: of pairs at 0.8 it keeps all, of pairs at 0.5, of which a twentieth has an equal band, none.
"""
_CHUNK = 1 << 16
"""Signatures that are read at once."""
NO_WORDS = np.uint32(0xFFFFFFFF)
"""Every hash of a text without words, which is no duplicate of any other."""

Signatures = NDArray[np.uint32]


def signature(text: str) -> Signatures:
    """The MinHash signature (112,) of a text."""
    minhash = import_extra("rensa", "data.near_dedup=true").RMinHash(num_perm=HASHES, seed=_SEED)
    words = words_of(text)
    if not words:
        return np.full(HASHES, NO_WORDS)
    minhash.update(list(grams(words, _GRAM)))
    return np.array(minhash.digest(), np.uint32)


@dataclass
class SignatureFile:
    """Signatures (documents, 112) in a temporary file without a name: 448 bytes a document."""

    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    count: int = 0

    def append(self, signatures: Signatures) -> NDArray[np.int64]:
        """Store the rows of an array; returns their numbers."""
        self.file.write(signatures.astype(np.uint32, copy=False).tobytes())
        first, self.count = self.count, self.count + len(signatures)
        return np.arange(first, self.count)

    def rows(self) -> Signatures:
        """All signatures that were stored, mapped."""
        self.file.flush()
        if not self.count:
            return np.zeros((0, HASHES), np.uint32)
        return np.memmap(self.file, np.uint32, "r", shape=(self.count, HASHES))


def earlier_twins(signatures: Signatures, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each document, in order, the first one of its group of near-duplicates; its own position if it is that.

    ``numbers`` are the rows of the documents in ``signatures``. A group is all that is linked by pairs. What is held in
    memory is some 24 bytes a document.
    """
    first = np.arange(len(numbers), dtype=np.int64)
    for band in range(BANDS):
        keys = _band_keys(signatures, numbers, band)
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        head = -1
        for at in same.tolist():
            left, right = int(order[at]), int(order[at + 1])
            if head < 0 or keys[head] != keys[left]:
                head = left
            for other in {left, head}:
                if _root(first, other) != _root(first, right) and _are_alike(signatures, numbers, other, right):
                    low, high = sorted((_root(first, other), _root(first, right)))
                    first[high] = low
    for position in range(len(first)):
        first[position] = _root(first, position)
    return first


def _root(first: NDArray[np.int64], position: int) -> int:
    """The first document of a group, and shorter ways to it."""
    path = []
    while (up := int(first[position])) != position:
        path.append(position)
        position = up
    first[path] = position
    return position


def _are_alike(signatures: Signatures, numbers: NDArray[np.int64], left: int, right: int) -> bool:
    one, other = signatures[numbers[left]], signatures[numbers[right]]
    return bool(one[0] != NO_WORDS and np.mean(one == other) >= _LEAST_EQUAL)


def _band_keys(signatures: Signatures, numbers: NDArray[np.int64], band: int) -> NDArray[np.uint64]:
    """A number of 64 bits of the hashes of a band, equal where they are equal."""
    keys = np.zeros(len(numbers), np.uint64)
    factor: Any = np.uint64(0x9E3779B97F4A7C15)
    for begin in range(0, len(numbers), _CHUNK):
        part = signatures[numbers[begin : begin + _CHUNK], band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        for row in range(ROWS):
            mixed = keys[begin : begin + _CHUNK] ^ part[:, row]
            keys[begin : begin + _CHUNK] = (mixed * factor) ^ (mixed >> np.uint64(29))
    return keys
