"""Prepare a corpus from text files, or find one that is prepared already.

    list_files -> build_spec (read, clean, deduplicate, split) -> build_corpus (tokenizer.json, shards, tables, index)

Every step is a function of the text and the settings, so a prepare that was killed continues where it was: a shard that
agrees with its receipt is kept. The index is written last; a folder without one is not a corpus.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from train.config import schema
from train.data import tokenizer
from train.data.chat.template import find_template
from train.data.corpus import shards
from train.data.corpus.index_schema import check_members
from train.data.corpus.verified_files import VerifiedFiles
from train.data.prepare import clean, workers
from train.data.prepare.build import CorpusBuild, build_corpus, claim_folder
from train.data.prepare.chat_shards import PackOptions
from train.data.prepare.corpus_spec import build_spec, corpus_settings
from train.data.prepare.documents import read_options
from train.data.prepare.first_pass import ReportProgress
from train.data.sources import local_copies
from train.data.sources.row_files import require_packages
from train.data.sources.source_files import CorpusFiles, SourceFile, evaluation_files, list_files
from train.errors import UserError
from train.util import io

_SOURCES = "sources.stamp"
_CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST),
)


CheckTokenizer = Callable[[tokenizer.Tokenizer], None]


def prepare(
    data: schema.DataConfig,
    report: ReportProgress,
    objective: schema.Objective | None = None,
    check: CheckTokenizer = lambda known: None,
) -> Path:
    """Prepare the corpus and return its folder; files that are there and whole are kept.

    ``check`` is called with the tokenizer before anything is written, unless that is a bpe, which is to be learned; it
    may raise UserError.

    Raises UserError for text that cannot be read, a label that ``objective`` does not know, a folder that holds another
    corpus, or one that cannot be written.
    """
    try:
        sources = list_files(data)
        if (current := _find_current(data, sources)) is not None:
            report({"phase": "ready", "folder": str(current), "new": False})
            return current
        beside = Path(data.dir).parent if data.dir else Path("corpora")
        evaluation = evaluation_files(data)
        require_packages([*sources, *evaluation], near_dedup=data.near_dedup)
        with (
            local_copies.with_copies([*sources, *evaluation], beside, data.encoding) as placed,
            workers.task_runner(data.workers or len(os.sched_getaffinity(0))) as run_tasks,
        ):
            sources, evaluation = placed[: len(sources)], placed[len(sources) :]
            if data.tokenizer.kind in ("bytes", "file"):
                check(tokenizer.Tokenizer(tokenizer.build_tokenizer(data.tokenizer, (), "")))
            packing = _packing(data) if data.is_chat else None
            digest = packing.template.digest if packing else ""
            spec = build_spec(
                data, CorpusFiles(sources, evaluation), read_options(data, objective), run_tasks, report, digest
            )
            if data.tokenizer.kind == "chars":
                check(tokenizer.Tokenizer(tokenizer.build_tokenizer(data.tokenizer, (), spec.characters)))
            folder = Path(data.dir) if data.dir else Path("corpora") / f"{data.source}-{spec.digest[:12]}"
            claim_folder(folder, spec)
            with io.FileLock(folder / ".lock", on_wait=lambda: report({"phase": "wait", "folder": str(folder)})):
                build_corpus(CorpusBuild(data, sources, spec, folder, run_tasks, report, packing))
                io.write_whole(folder / _SOURCES, _stamp(data, sources).encode())
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            raise UserError(
                f"the corpus cannot be written: {error.strerror}: {error.filename or data.dir or 'corpora'}. "
                "Free the place or set data.dir=/another/folder; shards that are finished are kept"
            ) from error
        raise
    report({"phase": "ready", "folder": str(folder), "new": True})
    return folder


def _packing(data: schema.DataConfig) -> PackOptions:
    """How the conversations of a corpus become rows. Raises UserError for a template that is none."""
    assert data.template is not None
    assert data.row_tokens is not None
    path = data.tokenizer.path if data.tokenizer.kind == "file" else None
    eos = tokenizer.Tokenizer(tokenizer.given_tokenizer(data.tokenizer)) if path else None
    template = find_template(data.template, path, eos.name_of(eos.eot) if eos else tokenizer.EOT)
    template.special_tokens()  # a template that is none is refused before anything is read
    return PackOptions(template, data.row_tokens, data.pack, data.bad_rows == "skip")


def find_prepared(data: schema.DataConfig) -> Path | None:
    """The folder of the corpus if it is prepared, whole and up to date with its sources, else None; fast.

    No text is read, only sizes and times of files. Raises UserError, with the cure, if a file is damaged.
    """
    sources = list_files(data)
    current = _find_current(data, sources)
    if current is None:
        for folder in _corpora_of(data, sources):
            _raise_on_damage(folder)
            return folder
    return current


def _stamp(data: schema.DataConfig, sources: list[SourceFile]) -> str:
    """A digest of the settings and of path, size and mtime of every source: a corpus with an equal one is current."""
    given = [file.stat() for file in tokenizer.given_files(data.tokenizer)]
    stamps: list[tuple[int, int] | None] = [(file.st_size, file.st_mtime_ns) for file in given]
    fixed: list[Any] = [shards.VERSION, clean.VERSION, corpus_settings(data), *(stamps or [None])]
    fixed += [_packing(data).template.digest] if data.is_chat else []
    listed = [(file.path, file.size, file.mtime_ns) for file in [*sources, *evaluation_files(data)]]
    return sha256(json.dumps([fixed, listed]).encode()).hexdigest()


def _find_current(data: schema.DataConfig, sources: list[SourceFile]) -> Path | None:
    return next((folder for folder in _corpora_of(data, sources) if _is_whole(folder)), None)


def _corpora_of(data: schema.DataConfig, sources: list[SourceFile]) -> Iterator[Path]:
    """The folders of complete corpora that were made from these sources in their present state."""
    try:
        stamp = _stamp(data, sources)
    except OSError:
        return  # the given tokenizer is missing: preparing reports it
    folders = [Path(data.dir)] if data.dir else sorted(Path("corpora").glob(f"{data.source}-*"))
    for folder in folders:
        with contextlib.suppress(OSError):
            if (folder / _SOURCES).read_text("utf-8") == stamp and (folder / shards.INDEX).exists():
                yield folder


def _is_whole(folder: Path) -> bool:
    """Whether every file of the index is known, by size and mtime, to have its sha256."""
    try:
        index = shards.read_index(folder)
        verified = VerifiedFiles(folder)
        return all(verified.is_verified(folder / name, digest) for name, _, digest in _indexed_files(index))
    except (UserError, OSError):
        return False


def _indexed_files(index: dict[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """(name, size, sha256) of every file in an index; the size of the tokenizer is not in it."""
    yield tokenizer.FILE, None, index["tokenizer"]["sha256"]
    for split in index["splits"].values():
        for entry in [split["table"], *split["shards"]]:
            yield entry["name"], entry["size"], entry["sha256"]


def _raise_on_damage(folder: Path) -> None:
    """Raise UserError for the first file that differs from the index; hashes only files that changed."""
    verified = VerifiedFiles(folder)
    for name, size, digest in _indexed_files(shards.read_index(folder)):
        verified.check(folder, name, size, digest, check_members if name.endswith(".tar") else None)
