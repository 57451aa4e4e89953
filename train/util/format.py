"""Numbers, durations and counts as short text for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

PREPARING = {
    "read": "reading and cleaning",
    "tokenizer": "making the tokenizer",
    "merges": "learning its merges",
    "tokenize": "writing shards",
}
"""The phases of preparing a corpus, in words."""


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
