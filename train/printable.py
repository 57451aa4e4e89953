"""Text and names of users as people see them: nothing that a terminal would obey, and one escape for each kind."""

from __future__ import annotations

import re
import unicodedata

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
