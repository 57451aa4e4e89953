"""The words of a text, as near-duplicates and copied passages are found by: runs of letters, and single characters
where no spaces part the words, as in Chinese and Japanese.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_UNSPACED_SIGN = re.compile(f"[{_UNSPACED}]")


def words_of(text: str) -> list[str]:
    """The words in small letters, without punctuation; of Chinese each character is one."""
    return _WORD.findall(text.lower())


def grams(words: list[str], size: int) -> Iterator[str]:
    """Every ``size`` words that follow each other, joined by spaces; all of a text that has fewer, if it has any."""
    if words:
        last = max(1, len(words) - size + 1)
        yield from (" ".join(words[begin : begin + size]) for begin in range(last))


def is_mostly_unspaced(text: str) -> bool:
    """Whether most of a text is in a script that does not part words by spaces."""
    return 2 * len(_UNSPACED_SIGN.findall(text)) > len(text)
