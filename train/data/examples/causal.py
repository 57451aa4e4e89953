"""Rows for predicting the next token: inputs, targets, positions and segments from pieces of stored documents."""

from __future__ import annotations

import numpy as np
import torch

from train.batch import IGNORE
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import Arrays, Columns
from train.data.sampling.epoch_order import DocSpans


class CausalExamples:
    """Rows of ``seq_len`` inputs, each with the token after it; with ``memory``, what each row goes on from."""

    chunk_tokens = 1 << 22
    """8 MB of them."""

    def __init__(self, seq_len: int, isolate: bool, memory: bool = False) -> None:
        self.row_tokens, self.isolate = seq_len, isolate
        self.columns: Columns = dict.fromkeys(("tokens", "targets", "positions"), ((seq_len,), torch.int64))
        self.columns["segments"] = (seq_len,), torch.int32
        if memory:
            self.columns["memory"] = (), torch.int64

    def read_rows(self, shards: CorpusSplit, pieces: DocSpans, epoch: int) -> CausalRows:
        """As ``Examples.read``."""
        return CausalRows(shards, pieces, self.row_tokens, self.isolate)


class CausalRows:
    """The rows that some pieces tile, in their order: read for many rows at once, to be written a few at a time.

    Reading is what may wait for a disk, and takes two bytes a token; writing is a copy of some microseconds.

    A piece of n places is read as n + 1 ids of its own document, so a target never comes from another one. Inside a row
    all pieces but the last end their documents with EOT, which is also what the next begins with; so one line of
    seq_len + 1 ids holds the inputs and the targets of a row. Padding: token 0, target IGNORE, segment 0.

    "memory" is 1 where a row goes on in the middle of a document (without ``isolate``: always), else -1.

    With ``isolate`` positions count within the piece and segments number the pieces of a row from 1; without, a row
    is one segment and positions count within it.
    """

    def __init__(self, shards: CorpusSplit, pieces: DocSpans, seq_len: int, isolate: bool) -> None:
        ends = np.cumsum(pieces.length)
        self._begins = ends - pieces.length
        self._lengths = pieces.length
        self._seq_len, self._isolate = seq_len, isolate
        row = self._begins // seq_len
        first = np.ones(len(row), bool)
        np.not_equal(row[1:], row[:-1], out=first[1:])
        last = np.append(first[1:], True)
        padding = pieces.sample < 0
        self._padding = padding if padding.any() else None
        more = last
        if self._padding is not None:
            # The one id more is the last real piece's; where a row is all padding, the padding's.
            more = np.where(padding, first & last, last | np.append(padding[1:], False))
        heads = np.flatnonzero(first)
        self._lines = np.empty((len(heads), seq_len + 1), shards.dtype)
        shards.read_spans(pieces._replace(length=pieces.length + more), self._lines.reshape(-1))
        self._goes_on = np.where((pieces.start[heads] > 0) | (not isolate), 1, -1)
        self._row_starts: list[int] = [*heads.tolist(), len(row)]
        self._numbers = (np.arange(1, len(row) + 1) - np.repeat(heads, np.diff(self._row_starts))).astype(np.int32)
        self._numbers[padding] = 0

    def write(self, begin: int, out: Arrays) -> None:
        """Write as many rows as ``out`` has, from row ``begin`` on."""
        count, seq_len = out["tokens"].shape
        part = slice(self._row_starts[begin], self._row_starts[begin + count])
        lengths = self._lengths[part]
        lines = self._lines[begin : begin + count]
        np.copyto(out["tokens"], lines[:, :-1])
        np.copyto(out["targets"], lines[:, 1:])
        if self._isolate:
            starts = (self._begins[part] - begin * seq_len).astype(np.int32)
            places = np.arange(count * seq_len, dtype=np.int32)
            np.copyto(out["positions"].reshape(-1), places - np.repeat(starts, lengths))
            np.copyto(out["segments"].reshape(-1), np.repeat(self._numbers[part], lengths))
        else:
            np.copyto(out["positions"], np.arange(seq_len))
            out["segments"].fill(1)
        if self._padding is not None and (padding := self._padding[part]).any():
            empty = np.repeat(padding, lengths).reshape(count, seq_len)
            out["tokens"][empty] = 0
            out["targets"][empty] = IGNORE
            out["segments"][empty] = 0
        if "memory" in out:  # the loader knows which row it is
            out["memory"][:] = self._goes_on[begin : begin + count]
