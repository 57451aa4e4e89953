"""The interface between the loader and an objective's rows, and functions that builders share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.corpus.shards import CorpusSplit
from train.data.sampling.epoch_order import DocSpans, Ints, splitmix64
from train.errors import UserError

Arrays = Mapping[str, NDArray[Any]]
Columns = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of one row's part of a Batch, by key."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NO_IDS = np.zeros(0, np.int64)


class ReadRows(Protocol):
    """Rows that are read from the corpus but not yet written to tensors."""

    def write(self, begin: int, out: Arrays) -> None:
        """Fill the arrays of ``out`` completely: as many rows as they have, from row ``begin`` on."""


class ExampleBuilder(Protocol):
    """Builds an objective's rows from stored documents, the same on any rank and for any world size."""

    row_tokens: int
    """Stored tokens that one row takes: the row length by which streams are cut."""
    chunk_tokens: int
    """Tokens to read at once: reader and model should rarely wait for each other, and memory is limited."""
    columns: Columns
    """Keys of the Batch, with shape and dtype of a row."""

    def read_rows(self, split: CorpusSplit, spans: DocSpans, epoch: int) -> ReadRows:
        """Read the rows that ``spans`` fill, ``row_tokens`` each, in order. All waiting for a disk happens here."""


@dataclass(frozen=True)
class TokenRows:
    """Stored tokens of packed rows, (rows, row_tokens) each."""

    ids: Ints
    segments: Ints
    """Number of the span within its row, from 1; 0 is padding."""
    sample: Ints
    offset: Ints
    """Position of the token within its sample."""

    def row(self, number: int) -> TokenRows:
        """One of the rows, (row_tokens,) each."""
        return TokenRows(self.ids[number], self.segments[number], self.sample[number], self.offset[number])

    def part(self, begin: int, end: int) -> TokenRows:
        """Tokens [begin, end) of a single row."""
        part = slice(begin, end)
        return TokenRows(self.ids[part], self.segments[part], self.sample[part], self.offset[part])


def read_token_rows(split: CorpusSplit, spans: DocSpans, row_tokens: int) -> TokenRows:
    """Read the rows that ``spans`` fill, with the sample and offset of every token."""
    ids = np.empty(int(spans.length.sum()), split.dtype)
    split.read_spans(spans, ids)
    ends = np.cumsum(spans.length)
    begins = ends - spans.length
    row = begins // row_tokens
    first = np.flatnonzero(np.append(True, row[1:] != row[:-1])) if len(row) else row
    number = np.arange(1, len(row) + 1) - np.repeat(first, np.diff(np.append(first, len(row))))
    number[spans.sample < 0] = 0
    owner = np.repeat(np.arange(len(row)), spans.length)
    offset = np.arange(len(ids)) - begins[owner] + spans.start[owner]
    shape = (-1, row_tokens)
    return TokenRows(
        ids.astype(np.int64).reshape(shape),
        number[owner].reshape(shape),
        spans.sample[owner].reshape(shape),
        offset.reshape(shape),
    )


def read_labelled(split: CorpusSplit, spans: DocSpans, row_tokens: int, eot: int) -> Iterator[tuple[int, Ints, Ints]]:
    """(sample, ids of its text up to ``row_tokens``, ids of its label) of each row; empty rows have sample -1.

    A row has one document, stored as [EOT, text, EOT, label, EOT]. Raises UserError for one without a label.
    """
    begins = np.cumsum(spans.length) - spans.length
    for sample in spans.sample[begins % row_tokens == 0].tolist():
        if sample < 0:
            yield sample, _NO_IDS, _NO_IDS
            continue
        ids = split.document(sample)
        borders = np.flatnonzero(ids == eot)
        if len(borders) != 1:
            raise UserError(
                f"document {sample} of {split.source(sample)} has no label: prepare the corpus with "
                "data.label_key=<field>, from .jsonl files"
            )
        text, label = ids[: borders[0]], ids[borders[0] + 1 :]
        yield sample, text[:row_tokens].astype(np.int64), label.astype(np.int64)


class BuiltRows:
    """Finished rows in memory, one array a key of the Batch."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def write(self, begin: int, out: Arrays) -> None:
        """Copy as many rows as ``out`` has, from row ``begin`` on."""
        for key, value in out.items():
            value[:] = self.arrays[key][begin : begin + len(value)]


def hashed_uniform(key: int, *numbers: Ints) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each element of arrays of one shape: a hash of the key and the elements."""
    bits = np.full(np.broadcast_shapes(*(n.shape for n in numbers)), key, np.uint64)
    for number in numbers:
        bits = splitmix64(bits + number.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


def positions_in_segments(segments: Ints) -> Ints:
    """The position of each token within its segment, (rows, T)."""
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    first = np.ones(segments.shape, bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
