"""Cleaning of one document's text. Changing what it does means raising VERSION: prepared corpora carry it."""

from __future__ import annotations

import re
import unicodedata

VERSION = 1

# C0 and C1 controls and the byte-order mark, without the newline and the tab.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_BLANK_RUN = re.compile("\n{4,}")


def clean(text: str) -> str:
    """The text in Unicode NFC, with "\\n" line ends, no control characters, no spaces at line ends and no long gaps.

    At most two blank lines stand in a row, none at the start, and the end has at most one "\\n". Returns "" where
    nothing but white space is left. Cleaning a cleaned text changes nothing.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _CONTROL.search(text):
        text = _CONTROL.sub("", text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = "\n".join(map(str.rstrip, text.split("\n")))
    body = text.strip("\n")
    if not body:
        return ""
    return _BLANK_RUN.sub("\n\n\n", body) + ("\n" if text.endswith("\n") else "")
