"""Rows of Parquet and Arrow files, by ``pyarrow``, which is imported when the first such file is read.

Batches of some megabytes are held at a time. A row is found again by its number: a process keeps its place in the last
few files, so that rows in rising order are read in one pass, and starts a new pass at the row group that holds the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from train.data.sources.file_kinds import FileKind, file_state
from train.data.sources.records import BadRecord
from train.util.extra_packages import import_extra
from train.util.reading import UNREADABLE, reason

_BATCH = 4 << 20
"""Bytes of rows that are read at once, about."""
_MOST_ROWS = 4096
_OPEN = 4
"""Files in which a process keeps its place."""


def scan(path: str, kind: FileKind, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, fields) of every row. Raises BadRecord where the file, or what follows, cannot be read."""
    for first, rows in _batches(path, kind, tuple(keys), 0):
        yield from enumerate(rows, first)


def load(path: str, kind: FileKind, row: int, keys: Sequence[str]) -> dict[str, Any]:
    """The fields of one row. Raises BadRecord."""
    return _place_in(path, file_state(path), kind, tuple(keys)).row(row)


@lru_cache(maxsize=_OPEN)
def _place_in(path: str, state: tuple[int, ...], kind: FileKind, keys: tuple[str, ...]) -> _RowReader:
    return _RowReader(path, kind, keys)


class _RowReader:
    """The place of a process in a file: the batch that it has read last."""

    def __init__(self, path: str, kind: FileKind, keys: tuple[str, ...]) -> None:
        self._open = path, kind, keys
        self._batches: Iterator[tuple[int, list[dict[str, Any]]]] = iter(())
        self._first, self._rows = 0, list[dict[str, Any]]()

    def row(self, number: int) -> dict[str, Any]:
        """The fields of a row; fast if it is behind the last one, and near."""
        if not self._first <= number <= self._first + len(self._rows) + _MOST_ROWS:
            self._batches = _batches(*self._open, number)
        while not self._first <= number < self._first + len(self._rows):
            try:
                self._first, self._rows = next(self._batches)
            except StopIteration:
                if self._rows and number < self._first:
                    raise BadRecord("is no longer there") from None
                self._batches, self._rows = _batches(*self._open, number), []
                self._first, self._rows = next(self._batches, (number + 1, []))
                if not self._rows:
                    raise BadRecord("is no longer there") from None
        return self._rows[number - self._first]


def _batches(
    path: str, kind: FileKind, keys: tuple[str, ...], start: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the first row, rows) of batches, in order; those that end before the row ``start`` may be left out."""
    arrow = import_extra("pyarrow", f"{path}: {kind.value}")
    unreadable = (*UNREADABLE, arrow.ArrowException)  # known before: a reader may be closed when modules are gone
    first = start
    try:
        for first, batch in (_parquet if kind is FileKind.PARQUET else _arrow)(path, keys, start):
            batch.validate(full=True)
            yield first, batch.to_pylist()
    except unreadable as error:
        if isinstance(error, BadRecord):
            raise
        words = "; ".join(reason(error).split("\n")[:2])
        raise BadRecord(f"is broken, and what follows cannot be read ({words})", place=f"row {first + 1}") from None


def _parquet(path: str, keys: tuple[str, ...], start: int) -> Iterator[tuple[int, Any]]:
    """(number of the first row, record batch) from the row group on that holds the row ``start``."""
    parquet = import_extra("pyarrow.parquet", path)
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        columns = _columns(keys, file.schema_arrow.names)
        first = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if first + group.num_rows > start:
                rows = _rows_at_once(group.total_byte_size, group.num_rows)
                at = first
                for batch in file.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False):
                    yield at, batch
                    at += batch.num_rows
            first += group.num_rows


def _arrow(path: str, keys: tuple[str, ...], start: int) -> Iterator[tuple[int, Any]]:
    """(number of the first row, record batch) of a file of either layout of Arrow, that with a footer or a stream."""
    arrow = import_extra("pyarrow", path)
    with arrow.memory_map(path) as mapped:
        stream = mapped.read(6) != b"ARROW1"
        mapped.seek(0)
        reader = (arrow.ipc.open_stream if stream else arrow.ipc.open_file)(mapped)
        columns = _columns(keys, reader.schema.names)
        batches = reader if stream else (reader.get_batch(number) for number in range(reader.num_record_batches))
        first = 0
        for whole in batches:
            if first + whole.num_rows > start:
                batch = whole.select(columns)
                step = _rows_at_once(batch.nbytes, batch.num_rows)
                for begin in range(0, batch.num_rows, step):
                    if first + begin + step > start:
                        yield first + begin, batch.slice(begin, step)
            first += whole.num_rows


def _columns(keys: tuple[str, ...], there: list[str]) -> list[str]:
    """The columns to read: those of ``keys`` that are there, all if it is empty. Raises BadRecord without the first."""
    if keys and keys[0] not in there:
        cure = "set data.text_key"
        raise BadRecord(f"no column {keys[0]!r}, its columns are {sorted(there)}", cure=cure)
    return [name for name in there if not keys or name in keys]


def _rows_at_once(size: int, rows: int) -> int:
    return max(1, min(_MOST_ROWS, _BATCH * rows // max(1, size)))
