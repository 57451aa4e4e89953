"""Problems of the text of a corpus: collected from all files, grouped, and shown together in one message."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError, shown_name
from train.util.format import plural

MAX_SHOWN = 20
"""Problems shown in one message; the others are only counted."""
_MAX_FILES = 3
"""Files that are named for a problem which many have."""
_BLOCK = 1 << 20
_POSITION = re.compile(r"(character|offset) \d+")
"""Positions inside a row, by which problems do not differ."""


class BadText(Exception):  # noqa: N818  collected and shown together, never raised to the user
    """Text that cannot be read: the file, what is wrong, and where; ``row`` if one row alone is at fault.

    ``place`` names a row that has no line, such as "row 17"; lines are counted in the local file ``counted``, by
    default the file itself. ``cure`` is set where the file as a whole is at fault, and all files of one kind have it;
    FILE stands for the path.
    """

    def __init__(self, path: str, what: str, offset: int | None = None, **more: Any) -> None:
        super().__init__(path, what, offset)
        self.path, self.what, self.offset, self.more = path, what, offset, more
        self.row: bool = more.get("row", False)
        self.cure: str | None = more.get("cure")
        self.place: str | None = more.get("place")
        self.counted: str | None = more.get("counted")

    def __reduce__(self) -> tuple[object, ...]:
        """Workers send it to the process that shows it."""
        return _bad_text, (self.path, self.what, self.offset, self.more)

    def __str__(self) -> str:
        """File, place and problem; a row is named by its number, which is counted only when it is shown."""
        name = shown_name(self.path)
        if self.place is not None:
            return f"{name}: {self.place} {self.what}"
        if self.offset is not None:
            line = _line_number(self.counted or self.path, self.offset)
            return f"{name}: line {line} (offset {self.offset}) {self.what}"
        return f"{name}: {self.in_words()}"

    def in_words(self) -> str:
        """The problem of a file and its cure, without the file's name."""
        return self.what + (f"; {self.cure.replace('FILE', shlex.quote(self.path))}" if self.cure else "")


def _bad_text(path: str, what: str, offset: int | None, more: dict[str, Any]) -> BadText:
    return BadText(path, what, offset, **more)


def _line_number(path: str, offset: int) -> int:
    """The number of the line, from 1, that holds the byte at ``offset``; 0 if the file can no longer be read."""
    number, left = 1, offset
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(min(left, _BLOCK)):
                number, left = number + block.count(b"\n"), left - len(block)
    except OSError:
        return 0
    return number


@dataclass
class _Group:
    """Problems of the same words: of one file, or of many where the words are about the file as a whole."""

    first: BadText
    count: int
    files: list[str]

    def __str__(self) -> str:
        others = self.count - 1
        if not others:
            return str(self.first)
        if self.first.cure:
            more = self.count - len(self.files)
            named = ", ".join(map(shown_name, self.files)) + (f" and {more:,} more" if more else "")
            return f"{plural(self.count, 'file')} ({named}): each {self.first.in_words()}"
        return f"{self.first} (and {plural(others, 'other line')} of this file)"


@dataclass
class Problems:
    """The first groups of problems, in order, and the number of all; of bounded size however many there are."""

    groups: dict[tuple[str, str], _Group] = field(default_factory=dict)
    count: int = 0
    """All problems; those of no group among them."""

    def add(self, problem: BadText) -> None:
        """Count a problem, in the group of its words."""
        key = ("" if problem.cure else problem.path, _POSITION.sub("", problem.what))
        self._join(key, _Group(problem, 1, [problem.path]))
        self.count += 1

    def merge(self, others: Problems) -> None:
        """Append the problems of another part of the text."""
        for key, group in others.groups.items():
            self._join(key, group)
        self.count += others.count

    def _join(self, key: tuple[str, str], group: _Group) -> None:
        if known := self.groups.get(key):
            known.count += group.count
            known.files = [*known.files, *group.files][:_MAX_FILES]
        elif len(self.groups) < MAX_SHOWN:
            self.groups[key] = group

    def as_note(self, key: str = "data.bad_rows") -> str:
        """How many were left out, as ``key``=skip asks, with the first of them; "" if there are none."""
        if not self.count:
            return ""
        first = next(iter(self.groups.values())).first
        what = plural(self.count, "row") if key == "data.bad_rows" else f"{self.count:,} rows or files"
        return f"{what} left out ({key}=skip); the first: {first}"

    def raise_all(self) -> None:
        """Raise all problems as one UserError, if there are any."""
        if not self.count:
            return
        lines = [str(group) for group in self.groups.values()]
        rest = self.count - sum(group.count for group in self.groups.values())
        lines += [f"... and {rest:,} more"] if rest else []
        if any(group.first.row for group in self.groups.values()):
            lines.append("data.bad_rows=skip leaves out the rows that cannot be read, and counts them")
        raise UserError("\n".join(["The corpus cannot be read:", *(f"  - {line}" for line in lines)]))


def merged(parts: Iterable[Problems]) -> Problems:
    """The problems of all parts, in their order."""
    whole = Problems()
    for part in parts:
        whole.merge(part)
    return whole
