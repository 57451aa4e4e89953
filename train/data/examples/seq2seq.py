"""Rows for T5: span corruption (Raffel et al. 2020, section 3.1.4), or given pairs of texts.

    text      Thank you for inviting me to your party last week .
    source    Thank you <extra_id_0> me to your party <extra_id_1> week .
    target    <extra_id_0> for inviting <extra_id_1> last

Source and target both end with the end-of-text token. The spans of a row are drawn by hashing (seed, epoch, sample,
offset) of its first token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.batch import IGNORE
from train.config.keys import objectives
from train.config.keys.base import ENCDEC_TOKENS
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import (
    BuiltRows,
    Columns,
    hashed_uniform,
    positions_in_segments,
    read_labelled,
    read_token_rows,
)
from train.data.sampling.epoch_order import DocSpans, Ints, hash_key
from train.data.tokenizer import Tokenizer

_REMOVED, _KEPT = 20, 21
"""Keys that keep the draws of the lengths of removed and of kept spans independent."""
SENTINELS = len(ENCDEC_TOKENS) - 1

_Text = tuple[Ints, Ints]
"""Token ids, and the number of the document that each belongs to."""
_Pair = tuple[_Text, _Text]
"""Source and target of one row."""
_NO_TEXT = np.zeros(0, np.int64), np.zeros(0, np.int64)
_EMPTY_ROW = _NO_TEXT, _NO_TEXT


def span_counts(length: int, objective: objectives.Seq2seq) -> tuple[int, int]:
    """(tokens removed, spans they form) for a text of ``length`` >= 2 tokens, as T5 rounds them."""
    removed = min(max(round(length * objective.rate), 1), length - 1)
    return removed, min(max(round(removed / objective.span), 1), removed, length - removed, SENTINELS)


def row_lengths(seq_len: int, objective: objectives.Seq2seq) -> tuple[int, int]:
    """(tokens of text in a row, tokens of its target) where sources have at most ``seq_len`` tokens.

    For span corruption the longest text whose source fits; the lengths of source and target include their end token.
    """
    if objective.task == "pairs":
        return seq_len, objective.target_len
    length = 2
    while _corrupted_lengths(length + 1, objective)[0] <= seq_len:
        length += 1
    return length, max(_corrupted_lengths(n, objective)[1] for n in range(2, length + 1))


def _corrupted_lengths(length: int, objective: objectives.Seq2seq) -> tuple[int, int]:
    """Tokens of source and of target of a text of ``length`` tokens, the end tokens included."""
    removed, spans = span_counts(length, objective)
    return length - removed + spans + 1, removed + spans + 1


class Seq2seqExamples:
    """Builds sources and targets of fixed length, padded at their ends."""

    chunk_tokens = 1 << 16

    def __init__(
        self, seq_len: int, isolate: bool, objective: objectives.Seq2seq, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.seq_len, self.isolate, self.objective, self.seed = seq_len, isolate, objective, seed
        self.eot, self.start = tokenizer.eot, tokenizer.id_of("<pad>")
        self.sentinels = np.array([tokenizer.id_of(name) for name in ENCDEC_TOKENS[1:]])
        self.row_tokens, self.target_len = row_lengths(seq_len, objective)
        source, target = (seq_len,), (self.target_len,)
        self.columns: Columns = {
            "tokens": (source, torch.int64),
            "targets": (target, torch.int64),
            "positions": (source, torch.int64),
            "segments": (source, torch.int32),
            "target_tokens": (target, torch.int64),
            "target_segments": (target, torch.int32),
        }

    def read_rows(self, split: CorpusSplit, spans: DocSpans, epoch: int) -> BuiltRows:
        """Implements ``ExampleBuilder.read_rows``: another epoch removes other spans; given pairs stay the same."""
        if self.objective.task == "pairs":
            pairs = read_labelled(split, spans, self.seq_len, self.eot)
            return BuiltRows(self._fill_arrays([self._truncate_pair(source, target) for _, source, target in pairs]))
        rows = read_token_rows(split, spans, self.row_tokens)
        corrupted = []
        for ids, segments, sample, offset in zip(rows.ids, rows.segments, rows.sample, rows.offset, strict=True):
            length = int((segments > 0).sum())
            owner = segments[:length] if self.isolate else np.ones(length, np.int64)
            corrupted.append(self._corrupt_spans((ids[:length], owner), (int(sample[0]), int(offset[0])), epoch))
        return BuiltRows(self._fill_arrays(corrupted))

    def _corrupt_spans(self, text: _Text, identity: tuple[int, int], epoch: int) -> _Pair:
        """Source and target of a text: spans replaced by sentinels, and the spans themselves behind their sentinels."""
        ids, owner = text
        if len(ids) < 2:
            return _EMPTY_ROW
        total, count = span_counts(len(ids), self.objective)
        removed = _random_partition(total, count, identity, hash_key(self.seed, epoch, _REMOVED))
        kept = _random_partition(len(ids) - total, count, identity, hash_key(self.seed, epoch, _KEPT))
        borders = np.cumsum(np.stack([kept, removed], 1).ravel())  # the text begins with a kept span
        source, target, begin = [], [], 0
        for number, (middle, end) in enumerate(borders.reshape(-1, 2).tolist()):
            sentinel = [self.sentinels[number]], owner[middle : middle + 1]
            source += [(ids[begin:middle], owner[begin:middle]), sentinel]
            target += [sentinel, (ids[middle:end], owner[middle:end])]
            begin = end
        last = [self.eot], owner[-1:]
        return _join([*source, last]), _join([*target, last])

    def _truncate_pair(self, source: Ints, target: Ints) -> _Pair:
        """A given source and target, cut to the row and each ended by EOT."""
        if not len(source) and not len(target):
            return _EMPTY_ROW
        whole = np.append(source[: self.seq_len - 1], self.eot), np.append(target[: self.target_len - 1], self.eot)
        source_text, target_text = ((part, np.ones(len(part), np.int64)) for part in whole)
        return source_text, target_text

    def _fill_arrays(self, rows: list[_Pair]) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            key: np.zeros((len(rows), *shape), np.int32 if dtype == torch.int32 else np.int64)
            for key, (shape, dtype) in self.columns.items()
        }
        arrays["targets"][:] = IGNORE
        for row, ((source, source_owner), (target, target_owner)) in enumerate(rows):
            arrays["tokens"][row, : len(source)], arrays["segments"][row, : len(source)] = source, source_owner
            arrays["targets"][row, : len(target)], arrays["target_segments"][row, : len(target)] = target, target_owner
            if len(target):
                # Each document's part of the target begins with the start token and does not see the document before.
                before = np.append(self.start, target[:-1])
                before[np.append(False, target_owner[1:] != target_owner[:-1])] = self.start
                arrays["target_tokens"][row, : len(target)] = before
        arrays["positions"] = positions_in_segments(arrays["segments"])
        return arrays


def _random_partition(total: int, count: int, identity: tuple[int, int], key: int) -> Ints:
    """Sizes of ``count`` non-empty parts of ``total``, every partition as likely as any other: (count,)."""
    order = hashed_uniform(key, *(np.full(total - 1, n) for n in identity), np.arange(total - 1)).argsort(kind="stable")
    borders = np.sort(order[: count - 1]) + 1
    return np.diff(borders, prepend=0, append=total)


def _join(parts: list[Any]) -> _Text:
    ids, owners = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(owners)
