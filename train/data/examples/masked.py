"""Rows for BERT: tokens hidden at random, and pairs of neighbouring or foreign text. Devlin et al. 2019, sections 3.1 and A.1.

Every draw is a hash of (seed, epoch, sample, place): which tokens of a document are hidden depends on nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.batch import IGNORE
from train.config.keys import objectives
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import BuiltRows, Columns, TokenRows, hashed_uniform, read_token_rows
from train.data.sampling.epoch_order import DocSpans, Ints, hash_key
from train.data.tokenizer import Tokenizer

_CHOOSE, _HOW, _OTHER, _CUT, _NEXT, _FROM, _AT = range(10, 17)
"""What a number is drawn for."""
HIDDEN, OTHER = 0.8, 0.1
"""Of the tokens that are chosen: replaced by [MASK]; replaced by any token. The rest stay as they are."""


class MaskedExamples:
    """[CLS] text [SEP], or [CLS] first [SEP] second [SEP], with some tokens hidden."""

    chunk_tokens = 1 << 16

    def __init__(
        self, seq_len: int, isolate: bool, objective: objectives.Masked, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.seq_len, self.isolate, self.objective, self.seed = seq_len, isolate, objective, seed
        self.eot = tokenizer.eot
        self.cls, self.sep, self.mask = (tokenizer.id_of(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special)
        self.inside = _word_continuations(tokenizer) if objective.whole_words else None
        self.row_tokens = seq_len - (3 if objective.next_sentence else 2)
        self.columns: Columns = dict.fromkeys(("tokens", "targets", "positions"), ((seq_len,), torch.int64))
        self.columns["segments"] = (seq_len,), torch.int32
        if objective.next_sentence:
            self.columns |= {"types": ((seq_len,), torch.int64), "next_targets": ((), torch.int64)}

    def read_rows(self, shards: CorpusSplit, pieces: DocSpans, epoch: int) -> BuiltRows:
        """As ``Examples.read``."""
        lines = read_token_rows(shards, pieces, self.row_tokens)
        arrays = self._pairs(shards, lines, epoch) if self.objective.next_sentence else self._singles(lines)
        sample, place = arrays.pop("sample"), arrays.pop("place")
        chosen = self._chosen(arrays["tokens"], sample, place, epoch)
        arrays["targets"] = np.where(chosen, arrays["tokens"], IGNORE)
        arrays["tokens"] = self._hide(arrays["tokens"], chosen, (sample, place), epoch)
        return BuiltRows(arrays)

    def _singles(self, lines: TokenRows) -> dict[str, NDArray[Any]]:
        """[CLS] text [SEP]; both belong to the document beside them."""
        arrays = self._empty(len(lines.ids))
        arrays["tokens"][:, 1:-1], arrays["segments"][:, 1:-1] = lines.ids, lines.segments
        arrays["sample"][:, 1:-1], arrays["place"][:, 1:-1] = lines.sample, lines.place
        real = (lines.segments > 0).sum(1)
        rows = np.flatnonzero(real)
        arrays["tokens"][rows, 0], arrays["tokens"][rows, real[rows] + 1] = self.cls, self.sep
        arrays["segments"][rows, 0] = 1
        arrays["segments"][rows, real[rows] + 1] = arrays["segments"][rows, real[rows]]
        if self.isolate:
            arrays["positions"] = positions_in_segments(arrays["segments"])
        else:
            arrays["segments"] = np.minimum(arrays["segments"], 1)
        return arrays

    def _pairs(self, shards: CorpusSplit, lines: TokenRows, epoch: int) -> dict[str, NDArray[Any]]:
        """[CLS] first [SEP] second [SEP]: the row cut inside its longest piece, the second part half the time from elsewhere."""
        arrays = self._empty(len(lines.ids))
        arrays["types"] = np.zeros_like(arrays["tokens"])
        arrays["next_targets"] = np.full(len(lines.ids), IGNORE)
        for row in np.flatnonzero(lines.segments[:, 0]).tolist():
            sizes = np.bincount(lines.segments[row])[1:]
            piece, length = int(sizes.argmax()), int(sizes.sum())
            begin = int(sizes[:piece].sum())
            identity = lines.sample[row, begin : begin + 1], lines.place[row, begin : begin + 1]
            draw = {
                n: float(hashed_uniform(hash_key(self.seed, epoch, n), *identity)[0]) for n in (_CUT, _NEXT, _FROM, _AT)
            }
            cut = begin + 1 + int(draw[_CUT] * (sizes[piece] - 1))
            first, second = lines.row(row).part(0, cut), lines.row(row).part(cut, length)
            told = sizes[piece] > 1  # else both parts would be of other documents
            arrays["next_targets"][row] = 0 if told else IGNORE
            if told and draw[_NEXT] < 0.5 and shards.samples > 1:
                second = _foreign(shards, int(identity[0][0]), len(second.ids), (draw[_FROM], draw[_AT]))
                arrays["next_targets"][row] = 1
            self._lay(arrays, row, first, second)
        return arrays

    def _lay(self, arrays: dict[str, NDArray[Any]], row: int, first: TokenRows, second: TokenRows) -> None:
        middle, end = len(first.ids) + 1, len(first.ids) + len(second.ids) + 2
        for part, at in ((first, 1), (second, middle + 1)):
            place = slice(at, at + len(part.ids))
            arrays["tokens"][row, place] = part.ids
            arrays["sample"][row, place], arrays["place"][row, place] = part.sample, part.place
        arrays["tokens"][row, [0, middle, end]] = self.cls, self.sep, self.sep
        arrays["segments"][row, : end + 1] = 1
        arrays["types"][row, middle + 1 : end + 1] = 1

    def _empty(self, rows: int) -> dict[str, NDArray[Any]]:
        shape = rows, self.seq_len
        arrays: dict[str, NDArray[Any]] = {key: np.zeros(shape, np.int64) for key in ("tokens", "place")}
        arrays["segments"] = np.zeros(shape, np.int32)
        arrays["sample"] = np.full(shape, -1)
        arrays["positions"] = np.broadcast_to(np.arange(self.seq_len), shape)
        return arrays

    def _chosen(self, tokens: Ints, sample: Ints, place: Ints, epoch: int) -> NDArray[np.bool_]:
        """Which tokens are to be predicted: none of the special ones; the tokens of a word together, drawn by its first."""
        word = np.broadcast_to(np.arange(self.seq_len), tokens.shape).copy()
        if self.inside is not None:
            begins, ends = self.inside
            goes_on = np.zeros(tokens.shape, bool)
            goes_on[:, 1:] = begins[tokens[:, 1:]] & ends[tokens[:, :-1]] & (sample[:, 1:] == sample[:, :-1])
            word[goes_on] = 0
            word = np.maximum.accumulate(word, axis=1)
        of_word = (np.take_along_axis(values, word, axis=1) for values in (sample, place))
        drawn = hashed_uniform(hash_key(self.seed, epoch, _CHOOSE), *of_word) < self.objective.rate
        return drawn & (sample >= 0) & (tokens != self.eot)

    def _hide(self, tokens: Ints, chosen: NDArray[np.bool_], where: tuple[Ints, Ints], epoch: int) -> Ints:
        how, other = (hashed_uniform(hash_key(self.seed, epoch, purpose), *where) for purpose in (_HOW, _OTHER))
        others = self.ordinary[(other * len(self.ordinary)).astype(np.int64)]
        shown = np.where(how < HIDDEN, self.mask, np.where(how < HIDDEN + OTHER, others, tokens))
        return np.where(chosen, shown, tokens)


def _foreign(shards: CorpusSplit, own: int, length: int, draws: tuple[float, float]) -> TokenRows:
    """At most ``length`` tokens from somewhere in another document."""
    sample = int(draws[0] * (shards.samples - 1))
    sample += sample >= own
    size = int(shards.sample_tokens[sample])
    start = min(1 + int(draws[1] * max(1, size - length)), size - 1)
    length = min(length, size - start)
    return read_token_rows(shards, DocSpans(*(np.array([n]) for n in (sample, start, length))), length).row(0)


def positions_in_segments(segments: Ints) -> Ints:
    """The place of each token within its segment, (rows, T)."""
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    first = np.ones(segments.shape, bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - np.maximum.accumulate(np.where(first, index, 0), axis=1)


def _word_continuations(tokenizer: Tokenizer) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each id: may it go on with a word that the token before began; may a word go on after it.

    A word is a run of letters and digits; a Chinese, Japanese or Korean sign is one by itself. Parts of a character are its word's.
    """
    texts = [tokenizer.decode([n]) for n in range(tokenizer.vocab_size)]
    names = [tokenizer.name_of(n) for n in range(tokenizer.vocab_size)]
    begins = [name.startswith("##") or _in_word(text[:1]) for name, text in zip(names, texts, strict=True)]
    return np.array(begins), np.array([_in_word(text[-1:]) for text in texts])


def _in_word(sign: str) -> bool:
    return sign == "\ufffd" or (sign.isalnum() and not "\u2e80" <= sign <= "\uffdc")
