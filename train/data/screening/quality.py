"""Rules that tell text worth learning from boilerplate: Gopher's, Gopher's on repetition, and those of C4 on documents.

Rae et al. 2021 (Gopher, table A1) and Raffel et al. 2020 (C4), with the limits that datatrove has. The rules on the
length of words and on English stop words are not applied to text without spaces, such as Chinese. C4's rules on single
lines are not here: a document stays whole, or goes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from train.data.screening.word_grams import is_mostly_unspaced, words_of

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25e6")
_ELLIPSES = ("...", "\u2026")
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]]|$)|[\u3002\uff01\uff1f]")
_TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
"""Words of a sequence -> the largest share of the text that the most frequent such sequence may make up."""
_REPEATED_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Words of a sequence -> the largest share of the text that may lie in such sequences which came before."""


def quality_problem(text: str, rules: Sequence[str]) -> str | None:
    """The first rule, of the sets that ``rules`` names, which a document breaks: "gopher: ..."; None for a good one."""
    for name in rules:
        if problem := RULES[name](text):
            return f"{name}: {problem}"
    return None


def _gopher(text: str) -> str | None:
    words, lines = text.split(), [line.strip() for line in text.splitlines() if line.strip()]
    unspaced = is_mostly_unspaced(text)
    count = len(words_of(text)) if unspaced else len(words)
    if not 50 <= count <= 100_000:
        return "fewer than 50 or more than 100,000 words"
    if not unspaced and not 3 <= sum(map(len, words)) / count <= 10:
        return "words of fewer than 3 or more than 10 letters on average"
    if text.count("#") / count > 0.1 or sum(map(text.count, _ELLIPSES)) / count > 0.1:
        return "more than one # or ellipsis in ten words"
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return "more than 90% of the lines are bullets"
    if sum(line.endswith(_ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "more than 30% of the lines end in an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "more than 20% of the words have no letter"
    if not unspaced and len(_STOP_WORDS.intersection(words_of(text))) < 2:
        return "fewer than two of the most frequent English words"
    return None


def _repetition(text: str) -> str | None:
    for unit, parts in (("lines", text.splitlines()), ("paragraphs", text.split("\n\n"))):
        kept = [part.strip() for part in parts if part.strip()]
        again = Counter(kept)
        repeated = len(kept) - len(again)
        letters = sum(len(part) * (times - 1) for part, times in again.items())
        if repeated > 0.3 * len(kept) or letters > 0.2 * len(text):
            return f"repeated {unit}"
    words = words_of(text)
    for size, most in _TOP_GRAMS.items():
        grams = Counter(tuple(words[begin : begin + size]) for begin in range(len(words) - size + 1))
        gram, times = grams.most_common(1)[0] if grams else ((), 0)
        if times > 1 and sum(map(len, gram)) * times > most * len(text):
            return f"a sequence of {size} words makes up more than {most:.0%}"
    for size, most in _REPEATED_GRAMS.items():
        if _repeated_letters(words, size) > most * len(text):
            return f"repeated sequences of {size} words make up more than {most:.0%}"
    return None


def _repeated_letters(words: list[str], size: int) -> int:
    """Letters in sequences of ``size`` words that came before; such sequences do not overlap."""
    seen: set[tuple[str, ...]] = set()
    letters = begin = 0
    while begin <= len(words) - size:
        gram = tuple(words[begin : begin + size])
        if gram in seen:
            letters += sum(map(len, gram))
            begin += size
        else:
            seen.add(gram)
            begin += 1
    return letters


def _c4(text: str) -> str | None:
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    if "{" in text:
        return "a curly bracket, as in code"
    if len(_SENTENCE_END.findall(text)) < 3:
        return "fewer than three sentences"
    return None


RULES: dict[str, Callable[[str], str | None]] = {"gopher": _gopher, "repetition": _repetition, "c4": _c4}
