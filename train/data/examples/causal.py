"""Rows for next-token prediction: tokens, targets, positions and segments of packed documents."""

from __future__ import annotations

import numpy as np
import torch

from train.batch import IGNORE
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import Arrays, Columns
from train.data.sampling.epoch_order import DocSpans


class CausalExamples:
    """Builds rows of ``seq_len`` tokens, each with the token after it as target.

    With ``memory`` a row also says whether a recurrent model carries its state over from the row before.
    """

    chunk_tokens = 1 << 22
    """8 MB of stored ids, of two bytes each."""

    def __init__(self, seq_len: int, isolate: bool, memory: bool = False) -> None:
        self.row_tokens, self.isolate = seq_len, isolate
        self.columns: Columns = dict.fromkeys(("tokens", "targets", "positions"), ((seq_len,), torch.int64))
        self.columns["segments"] = (seq_len,), torch.int32
        if memory:
            self.columns["memory"] = (), torch.int64

    def read_rows(self, split: CorpusSplit, spans: DocSpans, epoch: int) -> CausalRows:
        """Implements ``ExampleBuilder.read_rows``; the epoch has no influence."""
        return CausalRows(split, spans, self.row_tokens, self.isolate)


class CausalRows:
    """Rows read in bulk from the corpus, written to tensors a few at a time.

    Reading may wait for a disk and takes two bytes a token of memory; writing is a copy of some microseconds.

    A span of n tokens is read as n + 1 ids of its own document, so no target comes from another document. Inside a row
    every span but the last ends with EOT, which is also the first id of the next span; so one line of seq_len + 1 ids
    holds both inputs and targets of a row. Padding: token 0, target IGNORE, segment 0.

    "memory" is 1 where a row begins in the middle of a document (without ``isolate``: always), else -1.

    With ``isolate`` positions count within the span and segments number the spans of a row from 1; without, a row is
    one segment and positions count within the row.
    """

    def __init__(self, split: CorpusSplit, spans: DocSpans, seq_len: int, isolate: bool) -> None:
        ends = np.cumsum(spans.length)
        self._begins = ends - spans.length
        self._lengths = spans.length
        self._seq_len, self._isolate = seq_len, isolate
        row = self._begins // seq_len
        first = np.ones(len(row), bool)
        np.not_equal(row[1:], row[:-1], out=first[1:])
        last = np.append(first[1:], True)
        padding = spans.sample < 0
        self._padding = padding if padding.any() else None
        extra = last
        if self._padding is not None:
            # The extra id of a row belongs to its last real span; in a row of padding alone, to the padding.
            extra = np.where(padding, first & last, last | np.append(padding[1:], False))
        heads = np.flatnonzero(first)
        self._lines = np.empty((len(heads), seq_len + 1), split.dtype)
        split.read_spans(spans._replace(length=spans.length + extra), self._lines.reshape(-1))
        self._continues = np.where((spans.start[heads] > 0) | (not isolate), 1, -1)
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
            index = np.arange(count * seq_len, dtype=np.int32)
            np.copyto(out["positions"].reshape(-1), index - np.repeat(starts, lengths))
            np.copyto(out["segments"].reshape(-1), np.repeat(self._numbers[part], lengths))
        else:
            np.copyto(out["positions"], np.arange(seq_len))
            out["segments"].fill(1)
        if self._padding is not None and (padding := self._padding[part]).any():
            empty = np.repeat(padding, lengths).reshape(count, seq_len)
            out["tokens"][empty] = 0
            out["targets"][empty] = IGNORE
            out["segments"][empty] = 0
        if "memory" in out:  # the loader multiplies it by the number of the row
            out["memory"][:] = self._continues[begin : begin + count]
