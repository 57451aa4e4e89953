"""Numbers, durations and counts as short text for people."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

PREPARING = {
    "read": "reading and cleaning",
    "tokenizer": "making the tokenizer",
    "merges": "learning its merges",
    "tokenize": "writing shards",
}
"""The phases of preparing a corpus, in words."""

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of text."""


def escape_foreign_bytes(text: str) -> str:
    """A text that any stream takes: bytes that were not UTF-8 are written as ``\\xff``, all else as it is."""
    shown = (f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)
    return "".join(shown).encode("utf-8", "backslashreplace").decode()


def printable(text: str, one_line: bool = False) -> str:
    """``text`` with what a terminal would obey, and not show, as escapes such as ``\\x1b``; bytes as ``\\xff``.

    Tab and newline stay, and so do the joiners of letters and emoji. With ``one_line``, as for a path, nothing stays
    but what is seen, and blanks.
    """
    text = escape_foreign_bytes(text)
    if not one_line:
        return UNPRINTABLE.sub(lambda found: _escape(found[0]), text)
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def finite(value: Any) -> bool:
    """Whether ``value`` is a number that can be shown."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # math.isfinite fails at larger integers


def count(number: Any) -> str:
    """A number in three digits and a suffix: 950, 12.3k, 124M."""
    if not finite(number):
        return "?"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def duration(seconds: float) -> str:
    """A duration in its two largest units: 8 s, 2 min 05 s, 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(number: Any, word: str) -> str:
    """A count with its noun, in the plural unless it is 1."""
    return f"{number} {word}{'' if str(number) == '1' else 's'}"


def shares(parts: dict[str, float], least: float = 0.001) -> str:
    """Percentages of the whole, the largest first: train 93.1% · start 4.0%. Those below ``least`` are left out."""
    whole = sum(parts.values()) or 1.0
    ranked = sorted(((value / whole, name) for name, value in parts.items()), reverse=True)
    return " · ".join(f"{name} {share:.1%}" for share, name in ranked if share >= least)


def some(names: Sequence[str], most: int = 12) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
