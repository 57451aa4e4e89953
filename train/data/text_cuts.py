"""Where a text may be cut so that its parts, tokenised one by one, have the tokens of the whole.

The tokenizers library takes some 100 bytes of memory a token, and Python's lists 40: a text of any size is tokenised in
parts of bounded size. A part ends

- anywhere, if the tokenizer neither merges nor adds anything (bytes, characters);
- else where the pre-tokenizer, too, parts the words, and nothing is added: the tokens around a cut are compared with
  those of both sides;
- else, if the pre-tokenizer is one whose words depend on one character behind them, between the last two words.

Where none of these holds (a SentencePiece model without a pre-tokenizer, say), the text is tokenised as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Fast

PART = 1 << 17
"""Characters that are tokenised at once, about."""
LONGEST_WORD = 256
"""Characters of the longest word of a bpe that is learned here: the work on a word grows with its square."""
_CONTEXT = 512
"""Characters on each side of a cut whose tokens are compared."""
_SEARCHED = 1 << 13
_MOST_TRIED = 64
"""Characters before the end in which a cut is looked for, and places that are tried."""
_PLACE = re.compile(r"(?<=\S)(?=\s)|(?<=\n)(?=\w)")


def bounded_words() -> pre_tokenizers.PreTokenizer:
    """The words of GPT-2, none longer than LONGEST_WORD: letters, digits, other signs or spaces beyond it are cut."""
    some = f"{{1,{LONGEST_WORD}}}"
    pattern = (
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}{some}| ?\p{{N}}{some}| ?[^\s\p{{L}}\p{{N}}]{some}|\s{some}(?!\S)|\s{some}"
    )
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), in_bytes])


class TextCuts:
    """Cuts texts for one tokenizer."""

    def __init__(self, fast: Fast) -> None:
        self._fast = fast

    @cached_property  # a tenth of a second for a large vocabulary, and only long texts need it
    def _known(self) -> tuple[bool, bool]:
        """Whether any place is right, and whether words depend on no more than one character behind them."""
        content = json.loads(self._fast.to_str())
        if content["normalizer"] or any(not token["special"] for token in content["added_tokens"]):
            return False, False
        return _keeps_all_apart(content), content["pre_tokenizer"] in _local_words()

    def parts(self, pieces: Iterable[str], size: int = PART) -> Iterator[str]:
        """The text of pieces, which may be cut anywhere, in parts of about ``size`` characters that may be encoded."""
        text, wanted = "", size
        for piece in pieces:
            for begin in range(0, len(piece), size):
                text += piece[begin : begin + size]
                if len(text) < wanted:
                    continue
                cut = self._find(text)
                if cut:
                    yield text[:cut]
                text, wanted = text[cut:], (size if cut else 2 * len(text))
        if text:
            yield text

    def _find(self, text: str) -> int:
        """The last position near the end at which the text may be cut; 0 if there is none."""
        anywhere, local = self._known
        if anywhere:
            return len(text)
        if self._fast.pre_tokenizer is None:
            return 0
        start = max(0, len(text) - _SEARCHED)
        places = [start + place.start() for place in _PLACE.finditer(text[start:-_CONTEXT])]
        for cut in places[: -_MOST_TRIED - 1 : -1]:
            if cut and self._parts_words(text[max(0, cut - _CONTEXT) : cut], text[cut : cut + _CONTEXT]):
                return cut
        return self._between_last_words(text) if local else 0

    def _parts_words(self, left: str, right: str) -> bool:
        """Whether both sides have the words and the tokens that they have together."""
        return all(apart(left + right) == apart(left) + apart(right) for apart in (self._words, self._tokens))

    def _words(self, text: str) -> list[str]:
        normalizer, pre_tokenizer = self._fast.normalizer, self._fast.pre_tokenizer
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text) if normalizer else text)
        return [word for word, _ in words]

    def _tokens(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def _between_last_words(self, text: str) -> int:
        """The last border of words whose words are the same without what follows: not between a blank and a sign."""
        words = self._fast.pre_tokenizer.pre_tokenize_str(text)
        borders = (begin for _, (begin, _) in reversed(words))
        return next((n for n in borders if n and (text[n].isspace() or not text[n - 1].isspace())), 0)


def _keeps_all_apart(content: dict[str, Any]) -> bool:
    """Whether each character, or byte, is a token whatever is around it."""
    model, words = content["model"], content["pre_tokenizer"]
    in_bytes = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).__getstate__())
    return model["type"] == "BPE" and not model["merges"] and words in (None, in_bytes)


def _local_words() -> list[Any]:
    known = bounded_words(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [json.loads(words.__getstate__()) for words in known]
