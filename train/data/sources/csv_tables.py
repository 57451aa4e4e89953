"""Rows of tables of separated values, by Python's ``csv``: the first row names the columns.

A row is found again by the offset of its first byte and its length in bytes, whatever line ends its quoted fields hold.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, BinaryIO

from train.data.sources.file_kinds import file_state, inner_suffix
from train.data.sources.records import BadRecord

_LONGEST_FIELD = 1 << 28
"""Characters of the longest field: a quote that is never closed takes all that follows."""
_MARK = b"\xef\xbb\xbf"


def scan(path: str, errors: str) -> Iterator[tuple[int, int, Callable[[], dict[str, Any]]]]:
    """(offset, length, parse) of every row below the names of the columns; blank lines are left out."""
    with open(path, "rb") as stream:  # noqa: PTH123
        lines = _Lines(stream, errors)
        columns = _columns(path, lines)
        while True:
            begin = stream.tell()
            try:
                values, problem = next(lines.reader), None
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                values, problem = [], _in_words(error)
            if values or problem:
                yield begin, stream.tell() - begin, _parser(columns, values, problem)


def load(path: str, offset: int, length: int, errors: str) -> dict[str, Any]:
    """The fields of the row at ``offset``. Raises BadRecord."""
    columns = _columns_again(path, file_state(path), errors)
    with open(path, "rb") as stream:  # noqa: PTH123
        stream.seek(offset)
        lines = _Lines(stream, errors, length)
        try:
            values, problem = next(lines.reader, []), None
        except (csv.Error, UnicodeDecodeError) as error:
            values, problem = [], _in_words(error)
        return _parser(columns, values, problem)()


class _Lines:
    """The rows of the lines of a file, decoded, from where the stream stands, for at most ``length`` bytes."""

    def __init__(self, stream: BinaryIO, errors: str, length: int | None = None) -> None:
        csv.field_size_limit(_LONGEST_FIELD)
        self.stream, self.errors = stream, errors
        self.end = None if length is None else stream.tell() + length
        delimiter = "\t" if inner_suffix(str(stream.name))[0] == ".tsv" else ","
        self.reader = csv.reader(self._text(), delimiter=delimiter, strict=True)

    def _text(self) -> Iterator[str]:
        while (self.end is None or self.stream.tell() < self.end) and (raw := self.stream.readline()):
            yield raw.decode("utf-8", self.errors)


def _columns(path: str, lines: _Lines) -> tuple[str, ...]:
    """The names of the columns, from the first row. Raises BadRecord."""
    start = lines.stream.read(len(_MARK))
    lines.stream.seek(len(_MARK) if start == _MARK else 0)
    try:
        columns = next((row for row in lines.reader if row), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadRecord(f"its first row, which names the columns, {_in_words(error)}") from None
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise BadRecord(f"has the column {twice[0]!r} twice", 0)
    return tuple(columns)


@lru_cache(maxsize=8)
def _columns_again(path: str, state: tuple[int, ...], errors: str) -> tuple[str, ...]:
    with open(path, "rb") as stream:  # noqa: PTH123
        return _columns(path, _Lines(stream, errors))


def _parser(columns: tuple[str, ...], values: list[str], problem: str | None) -> Callable[[], dict[str, Any]]:
    def parse() -> dict[str, Any]:
        if problem:
            raise BadRecord(problem)
        if len(values) != len(columns):
            raise BadRecord(f"has {len(values)} fields, and the first row names {len(columns)}")
        if "\0" in "".join(values):
            raise BadRecord("has a zero byte")
        return dict(zip(columns, values, strict=True))

    return parse


def _in_words(error: csv.Error | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = f"byte 0x{error.object[error.start]:02x}"
        return f"cannot be read: {byte} is not UTF-8; convert the file, or take data.encoding_errors=replace"
    return f"is no row of separated values ({error})"
