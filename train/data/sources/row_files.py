"""Rows of any file that has rows: one pass over all of them, and one row again at its place.

JSON, tables of separated values, Parquet, Arrow and tars of samples give the same: a dict of fields a row, and two
numbers that find the row again in the file. What a field must hold is for the caller to say.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

from train.data.sources import arrow_tables, csv_tables, file_kinds, records, tars
from train.data.sources.file_kinds import FileKind
from train.data.sources.problems import BadText
from train.data.sources.records import BadRecord
from train.data.sources.source_files import SourceFile
from train.util.extra_packages import require_extra

BLOCK = 1 << 17
"""Bytes of a file, or characters of a text, that are read and cleaned at once: a document may be of any size."""
_BLANK = b" \t\r\n\xef\xbb\xbf"
"""Bytes of a line without a record: white space, and a byte-order mark."""

LoadRow = Callable[[], dict[str, Any]]
"""Returns the fields of a row. Raises BadText for a row that cannot be read; those after it can."""


def require_packages(files: Sequence[SourceFile], *, near_dedup: bool) -> None:
    """Add the packages that reading these files takes, in words, if they are lacking: before processes need them."""
    for file in files:
        if file.kind in (FileKind.PARQUET, FileKind.ARROW):
            require_extra("pyarrow", f"{file.path}: {file.kind.value}")
        if file_kinds.COMPRESSIONS.get(file_kinds.inner_suffix(file.path)[1] or "") == "zstd":
            require_extra("zstandard", f"{file.path}: compressed by Zstandard")
    if near_dedup:
        require_extra("rensa", "data.near_dedup=true: MinHash signatures")


def has_rows(file: SourceFile) -> bool:
    """Whether each document of a file is a row with fields."""
    return file.package_file is None and file.kind not in (FileKind.PLAIN, FileKind.TOKENS)


def scan_rows(
    file: SourceFile, span: tuple[int, int], keys: Sequence[str], errors: str
) -> Iterator[tuple[int, int, LoadRow]]:
    """(place, length, row) of the rows that begin in the bytes ``span`` of a file; of a file that is read as a whole,
    of all. Each row is loaded before the next one is asked for.

    ``keys`` are the fields that are wanted, all if empty; ``errors`` says what becomes of bytes that are not UTF-8:
    "strict" or "replace". Raises BadText where what follows cannot be read.
    """
    try:
        if file.kind in (FileKind.LINES, FileKind.JSON):
            with open(file.bytes_path, "rb") as stream:  # noqa: PTH123
                for offset, length, block in raw_rows(file, stream, *span):
                    yield offset, length, _json_loader(file, offset, block, keys, errors)
        elif file.kind is FileKind.TABLE:
            for offset, length, parse in csv_tables.scan(file.bytes_path, errors):
                yield offset, length, _loader(file, offset, parse)
        elif file.kind is FileKind.TAR:
            for offset, length, parse in tars.scan(file.bytes_path, _first(keys)):
                yield offset, length, _loader(file, offset, parse)
        else:
            for row, fields in arrow_tables.scan(file.bytes_path, file.kind, keys):
                yield row, 1, partial(_kept, fields)
    except BadRecord as error:
        raise _problem(file, error) from None


def load_row(file: SourceFile, place: tuple[int, int], keys: Sequence[str], errors: str) -> dict[str, Any]:
    """The fields of the row at a (place, length) that ``scan_rows`` gave. Raises BadText."""
    offset, length = place
    try:
        if file.kind is FileKind.TABLE:
            return csv_tables.load(file.bytes_path, offset, length, errors)
        if file.kind is FileKind.TAR:
            return tars.load(file.bytes_path, offset, length, _first(keys))
        if file.kind in (FileKind.PARQUET, FileKind.ARROW):
            return arrow_tables.load(file.bytes_path, file.kind, offset, keys)
        with open(file.bytes_path, "rb") as stream:  # noqa: PTH123
            stream.seek(offset)
            return _json_loader(file, offset, iter([stream.read(length)]), keys, errors)()
    except BadRecord as error:
        raise _problem(file, error) from None


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    return fields


def _first(keys: Sequence[str]) -> str:
    return keys[0] if keys else "text"


def _problem(file: SourceFile, error: BadRecord) -> BadText:
    """The error that a file as a whole, or from a place on, cannot be read."""
    return BadText(file.path, str(error), error.offset, place=error.place, counted=file.local, cure=error.cure)


def _loader(file: SourceFile, offset: int, parse: Callable[[], dict[str, Any]]) -> LoadRow:
    """``parse``, whose BadRecord is told as the problem of the row at ``offset``."""

    def load() -> dict[str, Any]:
        try:
            return parse()
        except BadRecord as error:
            raise file.bad_row(str(error), offset, error.place or place_of(file, offset)) from None

    return load


def place_of(file: SourceFile, offset: int) -> str | None:
    """The words that name a row of a table which has no lines; None for other rows."""
    return f"row {offset + 1}" if file.kind in (FileKind.PARQUET, FileKind.ARROW) else None


def _json_loader(file: SourceFile, offset: int, blocks: Iterator[bytes], keys: Sequence[str], errors: str) -> LoadRow:
    text = decode_blocks(file, offset, blocks, errors)
    return _loader(file, offset, lambda: records.parse_record("".join(text), keys))


def raw_rows(file: SourceFile, stream: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int, Iterator[bytes]]]:
    """(offset, length, bytes) of the rows of JSON, or lines, that begin in bytes [begin, end) and are not blank.

    The bytes are handed over, and not held here: a row may be large.
    """
    if file.kind is FileKind.JSON:
        for offset, raw in records.find_records(stream):
            yield offset, len(raw), iter([raw])
        return
    if begin:
        stream.seek(begin - 1)
        while (part := stream.readline(BLOCK)) and not part.endswith(b"\n"):  # a line of an earlier span
            if stream.tell() > end:
                return
    while (offset := stream.tell()) < end and (raw := stream.readline()):
        length, blank, block = len(raw), not raw.strip(_BLANK), iter([raw])
        del raw
        if not blank:
            yield offset, length, block


def decode_blocks(file: SourceFile, offset: int, blocks: Iterator[bytes], errors: str) -> Iterator[str]:
    """The text of a document's bytes, which begin at ``offset`` in the file. Raises BadText."""

    def problem(of_row: str, of_file: str) -> BadText:
        if file.kind is FileKind.PLAIN:
            return BadText(file.path, of_file)
        return file.bad_row(of_row, offset)

    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    begin = offset
    for block in chain(blocks, [b""]):
        if (nul := block.find(0)) >= 0:
            where = f"a zero byte at offset {begin + nul}"
            raise problem(f"has {where}", f"a binary file, not text ({where}); leave it out")
        undecoded = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = begin - undecoded + error.start
            cure = "convert the file, or take data.encoding_errors=replace"
            what = f"byte 0x{error.object[error.start]:02x} at offset {at} is not UTF-8; {cure}"
            raise problem(f"cannot be read: {what}", what) from None
        if text:
            yield text
        begin += len(block)
