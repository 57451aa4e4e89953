"""Rows for BERT: masked tokens, and pairs of texts (Devlin et al. 2019, sections 3.1 and A.1).

Every random draw is a hash of (seed, epoch, sample, offset), so which tokens of a document are masked does not depend
on the row, the rank or the world size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.batch import IGNORE
from train.config.keys import objectives
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import (
    BuiltRows,
    Columns,
    TokenRows,
    hashed_uniform,
    positions_in_segments,
    read_token_rows,
)
from train.data.sampling.epoch_order import DocSpans, Ints, hash_key
from train.data.tokenizer import Tokenizer

_CHOOSE, _REPLACEMENT, _RANDOM_TOKEN, _CUT, _NEXT, _OTHER_SAMPLE, _OTHER_START = range(10, 17)
"""Keys that keep the draws for different purposes independent."""
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Shares of the chosen tokens that become [MASK] or a random token; the rest stay as they are."""


class MaskedExamples:
    """Builds rows [CLS] text [SEP], or [CLS] first [SEP] second [SEP], with some tokens masked."""

    chunk_tokens = 1 << 16

    def __init__(
        self, seq_len: int, isolate: bool, objective: objectives.Masked, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.seq_len, self.isolate, self.objective, self.seed = seq_len, isolate, objective, seed
        self.eot = tokenizer.eot
        self.cls, self.sep, self.mask = (tokenizer.id_of(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special)
        self.continuations = _word_continuations(tokenizer) if objective.whole_words else None
        self.row_tokens = seq_len - (3 if objective.next_sentence else 2)
        self.columns: Columns = dict.fromkeys(("tokens", "targets", "positions"), ((seq_len,), torch.int64))
        self.columns["segments"] = (seq_len,), torch.int32
        if objective.next_sentence:
            self.columns |= {"types": ((seq_len,), torch.int64), "next_targets": ((), torch.int64)}

    def read_rows(self, split: CorpusSplit, spans: DocSpans, epoch: int) -> BuiltRows:
        """Implements ``ExampleBuilder.read_rows``: another epoch masks other tokens."""
        rows = read_token_rows(split, spans, self.row_tokens)
        arrays = self._text_pairs(split, rows, epoch) if self.objective.next_sentence else self._single_texts(rows)
        sample, offset = arrays.pop("sample"), arrays.pop("offset")
        chosen = self._choose_tokens(arrays["tokens"], sample, offset, epoch)
        arrays["targets"] = np.where(chosen, arrays["tokens"], IGNORE)
        arrays["tokens"] = self._mask_tokens(arrays["tokens"], chosen, (sample, offset), epoch)
        return BuiltRows(arrays)

    def _single_texts(self, rows: TokenRows) -> dict[str, NDArray[Any]]:
        """[CLS] text [SEP]; each special token is in the segment of the document next to it."""
        arrays = self._empty_arrays(len(rows.ids))
        arrays["tokens"][:, 1:-1], arrays["segments"][:, 1:-1] = rows.ids, rows.segments
        arrays["sample"][:, 1:-1], arrays["offset"][:, 1:-1] = rows.sample, rows.offset
        lengths = (rows.segments > 0).sum(1)
        real = np.flatnonzero(lengths)
        arrays["tokens"][real, 0], arrays["tokens"][real, lengths[real] + 1] = self.cls, self.sep
        arrays["segments"][real, 0] = 1
        arrays["segments"][real, lengths[real] + 1] = arrays["segments"][real, lengths[real]]
        if self.isolate:
            arrays["positions"] = positions_in_segments(arrays["segments"])
        else:
            arrays["segments"] = np.minimum(arrays["segments"], 1)
        return arrays

    def _text_pairs(self, split: CorpusSplit, rows: TokenRows, epoch: int) -> dict[str, NDArray[Any]]:
        """[CLS] first [SEP] second [SEP]: the row cut in two inside its longest span.

        Half of the time the second text is replaced by one from another document (next_targets 1).
        """
        arrays = self._empty_arrays(len(rows.ids))
        arrays["types"] = np.zeros_like(arrays["tokens"])
        arrays["next_targets"] = np.full(len(rows.ids), IGNORE)
        purposes = _CUT, _NEXT, _OTHER_SAMPLE, _OTHER_START
        for row in np.flatnonzero(rows.segments[:, 0]).tolist():
            sizes = np.bincount(rows.segments[row])[1:]
            longest, length = int(sizes.argmax()), int(sizes.sum())
            begin = int(sizes[:longest].sum())
            identity = rows.sample[row, begin : begin + 1], rows.offset[row, begin : begin + 1]
            draw = {n: float(hashed_uniform(hash_key(self.seed, epoch, n), *identity)[0]) for n in purposes}
            cut = begin + 1 + int(draw[_CUT] * (sizes[longest] - 1))
            first, second = rows.row(row).part(0, cut), rows.row(row).part(cut, length)
            has_target = sizes[longest] > 1  # else both parts are of different documents already
            arrays["next_targets"][row] = 0 if has_target else IGNORE
            if has_target and draw[_NEXT] < 0.5 and split.samples > 1:
                draws = draw[_OTHER_SAMPLE], draw[_OTHER_START]
                second = _text_of_another(split, int(identity[0][0]), len(second.ids), draws)
                arrays["next_targets"][row] = 1
            self._write_pair(arrays, row, first, second)
        return arrays

    def _write_pair(self, arrays: dict[str, NDArray[Any]], row: int, first: TokenRows, second: TokenRows) -> None:
        middle, end = len(first.ids) + 1, len(first.ids) + len(second.ids) + 2
        for part, begin in ((first, 1), (second, middle + 1)):
            columns = slice(begin, begin + len(part.ids))
            arrays["tokens"][row, columns] = part.ids
            arrays["sample"][row, columns], arrays["offset"][row, columns] = part.sample, part.offset
        arrays["tokens"][row, [0, middle, end]] = self.cls, self.sep, self.sep
        arrays["segments"][row, : end + 1] = 1
        arrays["types"][row, middle + 1 : end + 1] = 1

    def _empty_arrays(self, rows: int) -> dict[str, NDArray[Any]]:
        shape = rows, self.seq_len
        arrays: dict[str, NDArray[Any]] = {key: np.zeros(shape, np.int64) for key in ("tokens", "offset")}
        arrays["segments"] = np.zeros(shape, np.int32)
        arrays["sample"] = np.full(shape, -1)
        arrays["positions"] = np.broadcast_to(np.arange(self.seq_len), shape)
        return arrays

    def _choose_tokens(self, tokens: Ints, sample: Ints, offset: Ints, epoch: int) -> NDArray[np.bool_]:
        """Which tokens are to be predicted, (rows, T): no special ones; a word shares the draw of its first token."""
        word = np.broadcast_to(np.arange(self.seq_len), tokens.shape).copy()
        if self.continuations is not None:
            may_continue, may_be_continued = self.continuations
            same_word = np.zeros(tokens.shape, bool)
            same_word[:, 1:] = may_continue[tokens[:, 1:]] & may_be_continued[tokens[:, :-1]]
            same_word[:, 1:] &= sample[:, 1:] == sample[:, :-1]
            word[same_word] = 0
            word = np.maximum.accumulate(word, axis=1)
        of_word = (np.take_along_axis(values, word, axis=1) for values in (sample, offset))
        drawn = hashed_uniform(hash_key(self.seed, epoch, _CHOOSE), *of_word) < self.objective.rate
        return drawn & (sample >= 0) & (tokens != self.eot)

    def _mask_tokens(self, tokens: Ints, chosen: NDArray[np.bool_], identity: tuple[Ints, Ints], epoch: int) -> Ints:
        keys = (hash_key(self.seed, epoch, purpose) for purpose in (_REPLACEMENT, _RANDOM_TOKEN))
        replacement, choice = (hashed_uniform(key, *identity) for key in keys)
        random = self.ordinary[(choice * len(self.ordinary)).astype(np.int64)]
        kept_or_random = np.where(replacement < MASK_SHARE + RANDOM_SHARE, random, tokens)
        shown = np.where(replacement < MASK_SHARE, self.mask, kept_or_random)
        return np.where(chosen, shown, tokens)


def _text_of_another(split: CorpusSplit, own: int, length: int, draws: tuple[float, float]) -> TokenRows:
    """At most ``length`` tokens from a random position of a random sample that is not ``own``."""
    sample = int(draws[0] * (split.samples - 1))
    sample += sample >= own % split.samples  # a mixture numbers the samples of later epochs apart
    size = int(split.sample_tokens[sample])
    start = min(1 + int(draws[1] * max(1, size - length)), size - 1)
    length = min(length, size - start)
    return read_token_rows(split, DocSpans(*(np.array([n]) for n in (sample, start, length))), length).row(0)


def _word_continuations(tokenizer: Tokenizer) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(vocab_size,) each: may an id continue the word of the token before it; may a word go on after it.

    A word is a run of letters and digits; a Chinese, Japanese or Korean character is a word of its own. Tokens that
    are parts of one character belong to the same word.
    """
    texts = [tokenizer.decode([n]) for n in range(tokenizer.vocab_size)]
    names = [tokenizer.name_of(n) for n in range(tokenizer.vocab_size)]
    may_continue = [name.startswith("##") or _in_word(text[:1]) for name, text in zip(names, texts, strict=True)]
    return np.array(may_continue), np.array([_in_word(text[-1:]) for text in texts])


def _in_word(character: str) -> bool:
    return character == "\ufffd" or (character.isalnum() and not "\u2e80" <= character <= "\uffdc")
