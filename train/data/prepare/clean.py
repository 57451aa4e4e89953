"""Cleaning of one document's text.

A change to what becomes of ordinary text must raise VERSION, which corpora record. Beside it a corpus records the hash
of each cleaned text.
"""

from __future__ import annotations

import re
import unicodedata

VERSION = 1

# C0 and C1 control characters and the byte-order mark, except newline and tab.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
# Of those, the ones that separate: vertical tab, form feed, separators of files, groups, records and units, NEL.
_SEPARATORS = "\x0b\x0c\x1c-\x1f\x85"
_SILENT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_JOINT = re.compile(f"(?<=\\S)[{_SEPARATORS}]+(?=\\S)")
_BLANK_RUN = re.compile("\n{4,}")


def clean(text: str) -> str:
    """The text in Unicode NFC, with "\\n" line ends, without control characters, trailing spaces or long gaps.

    Between two words a control character that separates, such as a form feed, leaves a space.
    At most two blank lines follow each other, none at the start, and the text ends with at most one "\\n". Returns ""
    if nothing but white space is left. Idempotent: cleaning a cleaned text changes nothing.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _CONTROL.search(text):
        # A separator parts what it stands between; beside other white space nothing needs parting.
        text = _CONTROL.sub("", _JOINT.sub(" ", _SILENT.sub("", text)))
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = "\n".join(map(str.rstrip, text.split("\n")))
    body = text.strip("\n")
    if not body:
        return ""
    return _BLANK_RUN.sub("\n\n\n", body) + ("\n" if text.endswith("\n") else "")
