"""Rows for T5: what was cut out of a text is written back (Raffel et al. 2020, section 3.1.4); or given pairs of texts.

    text      Thank you for inviting me to your party last week .
    source    Thank you <extra_id_0> me to your party <extra_id_1> week .
    target    <extra_id_0> for inviting <extra_id_1> last

Both end with the token that ends documents. The cuts of a row are drawn by hashing (seed, epoch, sample, place) of its first token.
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
from train.data.examples.example_builder import BuiltRows, Columns, hashed_uniform, read_token_rows
from train.data.examples.labelled import read_labelled
from train.data.examples.masked import positions_in_segments
from train.data.sampling.epoch_order import DocSpans, Ints, hash_key
from train.data.tokenizer import Tokenizer

_CUT, _KEPT = 20, 21
"""What is drawn: the sizes of the cuts, and of what stands between them."""
SENTINELS = len(ENCDEC_TOKENS) - 1


def span_counts(length: int, objective: objectives.Seq2seq) -> tuple[int, int]:
    """(tokens cut out, cuts) of a text of so many tokens, two at least: T5's counts."""
    out = min(max(round(length * objective.rate), 1), length - 1)
    return out, min(max(round(out / objective.span), 1), out, length - out, SENTINELS)


def row_lengths(seq_len: int, objective: objectives.Seq2seq) -> tuple[int, int]:
    """(tokens of text behind a source of ``seq_len`` tokens, tokens of its target), the end tokens of both included."""
    if objective.task == "pairs":
        return seq_len, objective.target_len
    length = 2
    while _of(length + 1, objective)[0] <= seq_len:
        length += 1
    return length, max(_of(n, objective)[1] for n in range(2, length + 1))


def _of(length: int, objective: objectives.Seq2seq) -> tuple[int, int]:
    """Tokens of source and target of a text, the end tokens included."""
    out, count = span_counts(length, objective)
    return length - out + count + 1, out + count + 1


class Seq2seqExamples:
    """Sources and targets of fixed length, padded at their ends."""

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
        }
        self.columns |= {"segments": (source, torch.int32), "target_tokens": (target, torch.int64)}
        self.columns["target_segments"] = target, torch.int32

    def read_rows(self, shards: CorpusSplit, pieces: DocSpans, epoch: int) -> BuiltRows:
        """As ``Examples.read``."""
        if self.objective.task == "pairs":
            rows = [
                self._pair(source, target)
                for _, source, target in read_labelled(shards, pieces, self.seq_len, self.eot)
            ]
        else:
            lines = read_token_rows(shards, pieces, self.row_tokens)
            rows = []
            for ids, segments, sample, place in zip(lines.ids, lines.segments, lines.sample, lines.place, strict=True):
                real = int((segments > 0).sum())
                owner = segments[:real] if self.isolate else np.ones(real, np.int64)
                rows.append(self._spans(ids[:real], owner, (int(sample[0]), int(place[0])), epoch))
        return BuiltRows(self._lay(rows))

    def _spans(self, ids: Ints, owner: Ints, identity: tuple[int, int], epoch: int) -> _Row:
        """The source and the target of a text, each (ids, the documents that they belong to)."""
        if len(ids) < 2:
            return _NOTHING
        out, count = span_counts(len(ids), self.objective)
        cut = self._parts(out, count, identity, hash_key(self.seed, epoch, _CUT))
        kept = self._parts(len(ids) - out, count, identity, hash_key(self.seed, epoch, _KEPT))
        borders = np.cumsum(np.stack([kept, cut], 1).ravel())  # the text begins with what is kept
        source, target, at = [], [], 0
        for number, (middle, end) in enumerate(borders.reshape(-1, 2).tolist()):
            sentinel = [self.sentinels[number]], owner[middle : middle + 1]
            source += [(ids[at:middle], owner[at:middle]), sentinel]
            target += [sentinel, (ids[middle:end], owner[middle:end])]
            at = end
        last = [self.eot], owner[-1:]
        return _join([*source, last]), _join([*target, last])

    def _parts(self, total: int, count: int, identity: tuple[int, int], key: int) -> Ints:
        """The sizes of ``count`` parts of ``total``, none empty, every choice as likely as any other."""
        order = hashed_uniform(key, *(np.full(total - 1, n) for n in identity), np.arange(total - 1)).argsort(
            kind="stable"
        )
        borders = np.sort(order[: count - 1]) + 1
        return np.diff(borders, prepend=0, append=total)

    def _pair(self, source: Ints, target: Ints) -> _Row:
        if not len(source) and not len(target):
            return _NOTHING
        whole = np.append(source[: self.seq_len - 1], self.eot), np.append(target[: self.target_len - 1], self.eot)
        ids, answer = ((part, np.ones(len(part), np.int64)) for part in whole)
        return ids, answer

    def _lay(self, rows: list[_Row]) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            key: np.zeros((len(rows), *shape), np.int32 if kind == torch.int32 else np.int64)
            for key, (shape, kind) in self.columns.items()
        }
        arrays["targets"][:] = IGNORE
        for row, ((source, of_source), (target, of_target)) in enumerate(rows):
            arrays["tokens"][row, : len(source)], arrays["segments"][row, : len(source)] = source, of_source
            arrays["targets"][row, : len(target)], arrays["target_segments"][row, : len(target)] = target, of_target
            if len(
                target
            ):  # each document's part of the target begins with the same token, knowing nothing of the one before
                before = np.append(self.start, target[:-1])
                before[np.append(False, of_target[1:] != of_target[:-1])] = self.start
                arrays["target_tokens"][row, : len(target)] = before
        arrays["positions"] = positions_in_segments(arrays["segments"])
        return arrays


_Text = tuple[Ints, Ints]
_Row = tuple[_Text, _Text]
_EMPTY = np.zeros(0, np.int64), np.zeros(0, np.int64)
_NOTHING = _EMPTY, _EMPTY


def _join(parts: list[Any]) -> _Text:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([owner for _, owner in parts])
