"""From text to a prepared corpus, once: what is there and right is kept, and the second time there is nothing to do.

    list_files -> find_recipe (read, clean, drop repeats, hold out) -> make (tokenizer.json, shards, tables, index.json)

Every step is a function of the text and the settings, so a prepare that was killed goes on where it was: a shard with
a receipt that its bytes agree with is kept. The index comes last; a folder without one is not a corpus.
"""

from __future__ import annotations

import errno
import json
import os
from hashlib import sha256
from pathlib import Path

from train import schema
from train.data import clean, files, shards, tokenizer, work
from train.data.making import Making, enter, make
from train.data.recipe import Report, find_recipe, settings
from train.data.sources import SourceFile, list_files
from train.data.stamps import Stamps
from train.errors import UserError

_SOURCES = "sources.stamp"
_NO_PLACE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST),
)


def prepare(data: schema.Data, report: Report) -> Path:
    """The folder of the prepared corpus; what is there and whole is kept, what is missing or damaged is made.

    Raises UserError for text that cannot be read, a folder that holds another corpus, or one that cannot be written.
    """
    try:
        sources = list_files(data)
        if (current := _current(data, sources)) is not None:
            report({"phase": "ready", "folder": str(current), "new": False})
            return current
        with work.processes(data.workers or len(os.sched_getaffinity(0))) as run:
            recipe = find_recipe(data, sources, run, report)
            folder = Path(data.dir) if data.dir else Path("corpora") / f"{data.source}-{recipe.digest[:12]}"
            enter(folder, recipe)
            with files.locked(folder / ".lock", lambda: report({"phase": "wait", "folder": str(folder)})):
                make(Making(data, sources, recipe, folder, run, report))
                files.write_whole(folder / _SOURCES, _stamp(data, sources).encode())
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise UserError(
                f"the corpus cannot be written: {error.strerror}: {error.filename or data.dir or 'corpora'}. "
                "Free the place or set data.dir=/another/folder; shards that are finished are kept"
            ) from error
        raise
    report({"phase": "ready", "folder": str(folder), "new": True})
    return folder


def resolve(data: schema.Data) -> Path | None:
    """The folder of the corpus if it is prepared, whole and of these very sources; nothing is read but stamps."""
    return _current(data, list_files(data))


def _stamp(data: schema.Data, sources: list[SourceFile]) -> str:
    """A digest of the settings and of path, size and time of every file: while it lasts, the corpus is current."""
    given = Path(data.tokenizer.path).stat() if data.tokenizer.kind == "file" and data.tokenizer.path else None
    known = [shards.VERSION, clean.VERSION, settings(data), given and (given.st_size, given.st_mtime_ns)]
    listed = [(file.path, file.size, file.mtime_ns) for file in sources]
    return sha256(json.dumps([known, listed]).encode()).hexdigest()


def _current(data: schema.Data, sources: list[SourceFile]) -> Path | None:
    try:
        stamp = _stamp(data, sources)
    except OSError:
        return None  # the tokenizer's file is missing: the work itself says so
    folders = [Path(data.dir)] if data.dir else sorted(Path("corpora").glob(f"{data.source}-*"))
    for folder in folders:
        try:
            if (folder / _SOURCES).read_text("utf-8") == stamp and _whole(folder):
                return folder
        except OSError:
            continue
    return None


def _whole(folder: Path) -> bool:
    """Whether every file of the index is the one whose sha256 was found right."""
    try:
        index = shards.read_index(folder)
    except UserError:
        return False
    stamps = Stamps(folder)
    entries = [entry for split in index["splits"].values() for entry in [split["table"], *split["shards"]]]
    tokens = {"name": tokenizer.FILE, "sha256": index["tokenizer"]["sha256"]}
    return all(stamps.holds(folder / entry["name"], entry["sha256"]) for entry in [tokens, *entries])
