"""Cleaning of a document's text, piece by piece.

A change to what becomes of ordinary text must raise VERSION, which corpora record. Beside it a corpus records the hash
of each cleaned text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby

VERSION = 1

# C0 and C1 control characters and the byte-order mark, except newline and tab.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
# Of those, the ones that separate: vertical tab, form feed, separators of files, groups, records and units, NEL.
_SEPARATORS = "\x0b\x0c\x1c-\x1f\x85"
_SILENT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_JOINT = re.compile(f"(?<=\\S)[{_SEPARATORS}]+(?=\\S)")
_BLANK_RUN = re.compile("\n{4,}")
_MOST_NEWLINES = 3
_MARKS = re.compile(r"[^\w\s\x00-\x7f]{32,}")
"""Runs that may be combining marks, too long for normalisation to put in order by itself: its time is quadratic."""


def clean(text: str) -> str:
    """The text in Unicode NFC, with "\\n" line ends, without control characters, trailing spaces or long gaps.

    Between two words a control character that separates, such as a form feed, leaves a space.
    At most two blank lines follow each other, none at the start, and the text ends with at most one "\\n". Returns ""
    if nothing but white space is left. Idempotent: cleaning a cleaned text changes nothing.
    """
    return "".join(clean_pieces([text]))


def clean_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """The cleaned text of a document that comes in pieces, cut anywhere: joined it is ``clean`` of them joined.

    Holds a piece and the white space before it. No piece that it yields is empty.
    """
    white: list[str] = []  # behind the last text: what becomes of it depends on what follows
    started = False
    for piece in _normal_pieces(pieces):
        white.append(piece)
        if not piece or (piece.isspace() and "\n" not in piece):
            continue
        text = "".join(white)
        body = text.rstrip()
        white = [_shorten(text[len(body) :])]
        if body:
            lines = "\n".join(map(str.rstrip, body.split("\n")))
            yield _BLANK_RUN.sub("\n" * _MOST_NEWLINES, lines if started else lines.lstrip("\n"))
            started = True
    if started and "\n" in "".join(white):
        yield "\n"


def _shorten(white: str) -> str:
    """White space behind text that was read so far: the line ends that may stay, and what the last line begins with."""
    return "\n" * min(white.count("\n"), _MOST_NEWLINES) + white.rpartition("\n")[2]


def _normal_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces with plain line ends, without control characters, in NFC; cut where neither side changes the other."""
    held: list[str] = []
    for piece in pieces:
        if held and (cut := _independent(held[-1])):
            yield _normalise("".join([*held[:-1], held[-1][:cut]]))
            held = [held[-1][cut:]]
        held.append(piece)
    yield _normalise("".join(held))


def _independent(piece: str) -> int:
    """The last position before which the text is normalised apart from what follows; 0 if there is none."""
    for position in range(len(piece) - 1, 0, -1):
        if is_independent(piece[position]) and not _CONTROL.match(piece[position - 1]):
            return position
    return 0


def is_independent(character: str) -> bool:
    """Whether a character never joins the one before it: no combining mark, no part of a syllable, no control."""
    if character in "\n\t" or " " <= character < "\x7f":
        return True
    # Vowels and final consonants of Hangul and of Kirat Rai are letters that join what is before them.
    letters = "\u1100" <= character <= "\u11ff" or "\U00016d40" <= character <= "\U00016d7f"
    return not letters and unicodedata.category(character)[0] not in "MC"


def _normalise(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _CONTROL.search(text):
        # A separator parts what it stands between; beside other white space nothing needs parting.
        text = _CONTROL.sub("", _JOINT.sub(" ", _SILENT.sub("", text)))
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", _MARKS.sub(_sort_marks, text))
    return text


def _sort_marks(run: re.Match[str]) -> str:
    """The combining marks of a run in canonical order, which normalisation then need not bring about."""
    classes = groupby(run[0], lambda character: unicodedata.combining(character) > 0)
    return "".join("".join(sorted(part, key=unicodedata.combining) if marks else part) for marks, part in classes)
