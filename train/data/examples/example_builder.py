"""What an objective's rows are to the loader, and what most of them are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.corpus.shards import CorpusSplit
from train.data.sampling.epoch_order import DocSpans, Ints, splitmix64

Arrays = Mapping[str, NDArray[Any]]
Columns = dict[str, tuple[tuple[int, ...], torch.dtype]]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class ReadRows(Protocol):
    """Rows that are read but not yet written to tensors."""

    def write(self, begin: int, out: Arrays) -> None:
        """Write as many rows as the arrays of ``out`` have, from row ``begin`` on; every element of them."""


class ExampleBuilder(Protocol):
    """How stored documents become the rows of an objective. Rows are functions of the arguments, on any rank of any world."""

    row_tokens: int
    """Places of text that a row takes: what the streams are cut by."""
    chunk_tokens: int
    """Tokens to be read at once: so many that reader and model seldom wait for each other, so few that they fit in memory."""
    columns: Columns
    """Of a row, by key of the Batch: shape and type."""

    def read_rows(self, shards: CorpusSplit, pieces: DocSpans, epoch: int) -> ReadRows:
        """The rows that some pieces tile, ``places`` each, in their order. What may wait for a disk happens here."""


@dataclass(frozen=True)
class TokenRows:
    """Rows of ``places`` stored ids, (rows, places) each."""

    ids: Ints
    segments: Ints
    """Which piece of the row a place belongs to, from 1; 0 is padding."""
    sample: Ints
    place: Ints
    """Which place of that sample it is."""

    def row(self, number: int) -> TokenRows:
        """One of the rows, (places,) each."""
        return TokenRows(self.ids[number], self.segments[number], self.sample[number], self.place[number])

    def part(self, begin: int, end: int) -> TokenRows:
        """Of one row: places [begin, end)."""
        part = slice(begin, end)
        return TokenRows(self.ids[part], self.segments[part], self.sample[part], self.place[part])


def read_token_rows(shards: CorpusSplit, pieces: DocSpans, places: int) -> TokenRows:
    """The inputs of the rows that some pieces tile."""
    ids = np.empty(int(pieces.length.sum()), shards.dtype)
    shards.read_spans(pieces, ids)
    ends = np.cumsum(pieces.length)
    begins = ends - pieces.length
    row = begins // places
    first = np.flatnonzero(np.append(True, row[1:] != row[:-1])) if len(row) else row
    number = np.arange(1, len(row) + 1) - np.repeat(first, np.diff(np.append(first, len(row))))
    number[pieces.sample < 0] = 0
    owner = np.repeat(np.arange(len(row)), pieces.length)
    place = np.arange(len(ids)) - begins[owner] + pieces.start[owner]
    shape = (-1, places)
    return TokenRows(
        ids.astype(np.int64).reshape(shape),
        number[owner].reshape(shape),
        pieces.sample[owner].reshape(shape),
        place.reshape(shape),
    )


class BuiltRows:
    """Rows that are made already: an array a key."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def write(self, begin: int, out: Arrays) -> None:
        """As ``Rows.write``."""
        for key, value in out.items():
            value[:] = self.arrays[key][begin : begin + len(value)]


def hashed_uniform(key: int, *numbers: Ints) -> NDArray[np.float64]:
    """A number in [0, 1) for every place of some arrays of one shape, drawn by hashing the key with what they hold there."""
    bits = np.full(np.broadcast_shapes(*(n.shape for n in numbers)), key, np.uint64)
    for number in numbers:
        bits = splitmix64(bits + number.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53
