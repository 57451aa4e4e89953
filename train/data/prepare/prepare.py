"""From text to a prepared corpus, once: what is there and right is kept, and the second time there is nothing to do.

    list_files -> find_recipe (read, clean, drop repeats, hold out) -> make (tokenizer.json, shards, tables, index.json)

Every step is a function of the text and the settings, so a prepare that was killed goes on where it was: a shard with
a receipt that its bytes agree with is kept. The index comes last; a folder without one is not a corpus.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from train.config import schema
from train.data import tokenizer
from train.data.corpus import shards
from train.data.corpus.index_schema import check_members
from train.data.corpus.verified_files import VerifiedFiles
from train.data.prepare import clean, workers
from train.data.prepare.build import Making, enter, make
from train.data.prepare.corpus_spec import Report, build_spec, settings
from train.data.prepare.sources import SourceFile, list_files, reading
from train.errors import UserError
from train.util import io

_SOURCES = "sources.stamp"
_NO_PLACE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST),
)


def prepare(data: schema.DataConfig, report: Report, objective: schema.Objective | None = None) -> Path:
    """The folder of the prepared corpus; what is there and whole is kept, what is missing or damaged is made.

    Raises UserError for text that cannot be read, a label that ``objective`` does not know, a folder that holds another corpus, or
    one that cannot be written.
    """
    try:
        sources = list_files(data)
        if (current := _current(data, sources)) is not None:
            report({"phase": "ready", "folder": str(current), "new": False})
            return current
        with workers.processes(data.workers or len(os.sched_getaffinity(0))) as run:
            recipe = build_spec(data, sources, reading(data, objective), run, report)
            folder = Path(data.dir) if data.dir else Path("corpora") / f"{data.source}-{recipe.digest[:12]}"
            enter(folder, recipe)
            with io.locked(folder / ".lock", lambda: report({"phase": "wait", "folder": str(folder)})):
                make(Making(data, sources, recipe, folder, run, report))
                io.write_whole(folder / _SOURCES, _stamp(data, sources).encode())
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise UserError(
                f"the corpus cannot be written: {error.strerror}: {error.filename or data.dir or 'corpora'}. "
                "Free the place or set data.dir=/another/folder; shards that are finished are kept"
            ) from error
        raise
    report({"phase": "ready", "folder": str(folder), "new": True})
    return folder


def resolve(data: schema.DataConfig) -> Path | None:
    """The folder of the corpus if it is prepared, whole and of these very sources; nothing is read but stamps.

    Raises UserError, with the cure, where it is prepared and a file is no longer what the index says.
    """
    sources = list_files(data)
    found = _current(data, sources)
    if found is None:
        for folder in _of_these(data, sources):
            _refuse_damage(folder)
            return folder
    return found


def _stamp(data: schema.DataConfig, sources: list[SourceFile]) -> str:
    """A digest of the settings and of path, size and time of every file: while it lasts, the corpus is current."""
    given = Path(data.tokenizer.path).stat() if data.tokenizer.kind == "file" and data.tokenizer.path else None
    known = [shards.VERSION, clean.VERSION, settings(data), given and (given.st_size, given.st_mtime_ns)]
    listed = [(file.path, file.size, file.mtime_ns) for file in sources]
    return sha256(json.dumps([known, listed]).encode()).hexdigest()


def _current(data: schema.DataConfig, sources: list[SourceFile]) -> Path | None:
    return next((folder for folder in _of_these(data, sources) if _whole(folder)), None)


def _of_these(data: schema.DataConfig, sources: list[SourceFile]) -> Iterator[Path]:
    """The corpora that were made, to the end, of these sources as they are now."""
    try:
        stamp = _stamp(data, sources)
    except OSError:
        return  # the tokenizer's file is missing: the work itself says so
    folders = [Path(data.dir)] if data.dir else sorted(Path("corpora").glob(f"{data.source}-*"))
    for folder in folders:
        with contextlib.suppress(OSError):
            if (folder / _SOURCES).read_text("utf-8") == stamp and (folder / shards.INDEX).exists():
                yield folder


def _whole(folder: Path) -> bool:
    """Whether every file of the index is the one whose sha256 was found right."""
    try:
        index = shards.read_index(folder)
        stamps = VerifiedFiles(folder)
        return all(stamps.holds(folder / name, digest) for name, _, digest in _promised(index))
    except (UserError, OSError):
        return False


def _promised(index: dict[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """(name, size, sha256) of every file that an index speaks of."""
    yield tokenizer.FILE, None, index["tokenizer"]["sha256"]
    for split in index["splits"].values():
        for entry in [split["table"], *split["shards"]]:
            yield entry["name"], entry["size"], entry["sha256"]


def _refuse_damage(folder: Path) -> None:
    """Raise UserError for the first file that is not what the index says; hashes those that changed since they were."""
    stamps = VerifiedFiles(folder)
    for name, size, digest in _promised(shards.read_index(folder)):
        stamps.check(folder, name, size, digest, check_members if name.endswith(".tar") else None)
