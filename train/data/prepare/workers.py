"""Work of `prepare`'s processes: find documents in a span of bytes, write a shard; and their pool.

Nothing here imports torch, so that the processes start fast. Arguments and results are small: positions of documents,
never their text.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.shards import Ids, ShardEntry, write_shard
from train.data.prepare.documents import (
    CHANGED,
    LABEL,
    Meta,
    Pieces,
    ReadOptions,
    read_document,
    read_span,
    text_size,
    token_maker,
)
from train.data.screening.screen import Dropped, Screen, ScreenOptions
from train.data.sources.file_kinds import FileKind
from train.data.sources.problems import BadText, Problems
from train.data.sources.source_files import SourceFile
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.errors import ExitCode, UserError

DOCUMENT = np.dtype(
    [
        ("file", "<i4"),  # index in the list of source files
        ("offset", "<i8"),  # of its first byte in the file
        ("length", "<i8"),  # bytes in the file
        ("bytes", "<i8"),  # bytes of cleaned text
        ("hash", "<u8", (2,)),  # first 128 bits of the sha256 of the cleaned text and its label
        ("split_hash", "<u8"),  # first 64 bits of the sha256 of the text alone: decides the split
        ("begin", "<i8"),  # characters [begin, end) of the cleaned text: all of it, unless the only
        ("end", "<i8"),  # document of a corpus is cut in two, for train and val
        ("meta", "<u8"),  # first 64 bits of the sha256 of what is stored beside it; 0 if nothing is
    ]
)
WHOLE = np.iinfo(np.int64).max

Documents = NDArray[np.void]


@dataclass(frozen=True)
class ByteSpan:
    """Bytes [begin, end) of a file, to be searched for documents."""

    number: int
    file: SourceFile
    begin: int
    end: int


@dataclass(frozen=True)
class FoundDocuments:
    """The documents of some spans in order, problems of reading, those that were set aside, characters if wanted, bytes
    read.
    """

    documents: Documents
    problems: Problems
    skipped: Problems
    set_aside: list[BadText]
    """Each problem in ``skipped``, to be listed beside the corpus."""
    dropped: Dropped
    """Documents that were left out on purpose."""
    signatures: NDArray[np.uint32]
    """MinHash signatures of the documents (documents, 112), if near-duplicates are looked for."""
    characters: frozenset[str]
    read: int


def find_documents(
    spans: list[ByteSpan], options: ReadOptions, screening: ScreenOptions, with_characters: bool, most: int
) -> FoundDocuments:
    """Read, clean, screen and hash every document that begins in the spans, or the first ``most``; empty ones are left
    out.
    """
    rows: list[tuple[Any, ...]] = []
    problems, set_aside = Problems(), list[BadText]()
    characters: set[str] | None = set() if with_characters else None
    meta: Meta = {}
    screen = Screen(screening)

    def report(problem: BadText) -> None:
        if options.skip_files or (problem.row and options.skip_rows):
            set_aside.append(problem)
        else:
            problems.add(problem)

    for span in spans:
        try:
            for offset, length, pieces in read_span(span.file, span.begin, span.end, options, meta):
                try:
                    kept = _screened(screen, span.file, offset, pieces, options) if screening.active else pieces
                    if measured := _measure(kept, characters, options):
                        rows.append((span.number, offset, length, *measured, 0, WHOLE, _meta_hash(meta)))
                except BadText as problem:
                    report(problem)
                if len(rows) >= most:
                    break
        except BadText as problem:
            report(problem)
        except OSError as error:
            report(BadText(span.file.path, error.strerror or str(error)))
        if len(rows) >= most:
            break
    skipped = Problems()
    for bad in set_aside:
        skipped.add(bad)
    return FoundDocuments(
        *(np.array(rows, DOCUMENT), problems, skipped, set_aside, screen.dropped, screen.stacked()),
        *(frozenset(characters or ()), sum(span.end - span.begin for span in spans)),
    )


def _screened(screen: Screen, file: SourceFile, offset: int, pieces: Pieces, options: ReadOptions) -> Pieces:
    """The pieces of a document that stays; none of one that is dropped."""
    held = list(pieces)
    texts = (piece if isinstance(piece, str) else _decoded(piece, options) for piece in held)
    text = "".join(text for text in texts if not text.startswith(LABEL))
    return iter(held if text and screen.keeps(file, offset, text) else [])


def _decoded(ids: NDArray[Any], options: ReadOptions) -> str:
    return "".join(token_maker(options).decode_parts(ids))


def _meta_hash(meta: Meta) -> int:
    return _hash128(sha256(json.dumps(meta, sort_keys=True).encode()))[0] if meta else 0


def _measure(
    pieces: Pieces, characters: set[str] | None, options: ReadOptions
) -> tuple[int, tuple[int, int], int] | None:
    """(bytes, hash, split_hash) of a document, as DOCUMENT has them, or None if it is empty; adds its characters."""
    size, digest, text_digest = 0, sha256(), None
    for piece in pieces:
        if _is_label(piece):
            text_digest = digest.copy()
        if characters is not None:
            characters.update(piece.removeprefix(LABEL))
        encoded = _piece_bytes(piece)
        digest.update(encoded)
        size += len(encoded) if isinstance(piece, str) else text_size(piece, options)
    return (size, _hash128(digest), _hash128(text_digest or digest)[0]) if size else None


def _is_label(piece: Any) -> bool:
    return isinstance(piece, str) and piece.startswith(LABEL)


def _piece_bytes(piece: Any) -> bytes:
    """The bytes by which a piece of a document is hashed."""
    encoded: bytes = piece.encode() if isinstance(piece, str) else piece.tobytes()
    return encoded


def _hash128(digest: Any) -> tuple[int, int]:
    """The first 128 bits of a sha256, as two 64-bit numbers."""
    high, low = struct.unpack(">QQ", digest.digest()[:16])
    return high, low


def document_pieces(file: SourceFile, document: np.void, options: ReadOptions, meta: Meta | None = None) -> Pieces:
    """The text that one record of DOCUMENT refers to in its file, in pieces, as ``read_document`` gives them; ``meta``
    holds what is stored beside it from the first piece on.

    Raises UserError, behind the last piece, if the file has changed since: what was made of the others is wrong then.
    """
    begin, end, position, digest = int(document["begin"]), int(document["end"]), 0, sha256()
    for piece in read_document(file, int(document["offset"]), int(document["length"]), options, meta):
        digest.update(_piece_bytes(piece))
        part = piece[max(begin - position, 0) : max(end - position, 0)]
        if len(part):
            yield part
        position += len(piece)
    if _hash128(digest) != tuple(document["hash"].tolist()):
        raise UserError(f"{file.path}: {CHANGED}")


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: its documents, numbered from ``first`` in their split."""

    path: Path
    first: int
    documents: Documents
    files: dict[int, SourceFile]
    options: ReadOptions
    dtype: str


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


Counts = Counter[str]
"""What was counted in a shard, by name; "unknown": characters that the tokenizer does not know."""


def encode_shard(job: ShardJob) -> tuple[ShardEntry, Ids, Counts]:
    """Tokenise a shard's documents and write it beside the tokenizer; last, what was counted."""
    tokenizer = _tokenizer(job.path.parent)
    unknown = 0

    def stored() -> Iterator[tuple[Meta, int, Iterator[NDArray[Any]]]]:
        for document in job.documents:
            file, meta = job.files[int(document["file"])], Meta()
            pieces = document_pieces(file, document, job.options, meta)
            if job.options.has_meta:
                pieces = chain([next(pieces)], pieces)
            parts = stored_ids(pieces, file.kind is FileKind.TOKENS)
            about = {"source": file.name, **meta}
            yield about, int(document["bytes"]), (np.array(ids, job.dtype) for ids in parts)

    def stored_ids(
        pieces: Pieces, from_ids: bool
    ) -> Iterator[list[int]]:  # eot, text, eot, and if it has a label that, and eot again
        nonlocal unknown
        yield [tokenizer.eot]
        for is_label, part in groupby(pieces, _is_label):
            if is_label:
                yield [tokenizer.eot]
            if from_ids:
                yield from (piece.tolist() for piece in part)
                continue
            for text, ids in tokenizer.encode_pieces(piece.removeprefix(LABEL) for piece in part):
                unknown += tokenizer.count_unknown(text, ids)
                yield ids
        yield [tokenizer.eot]

    entry, table = write_shard(job.path, job.first, np.dtype(job.dtype), stored())
    return entry, table, Counts(unknown=unknown)


TaskRunner = Callable[..., Iterator[Any]]
"""run_tasks(function, tasks) yields (index of the task, ``function(*task)``) in the order in which tasks finish."""


@contextmanager
def task_runner(count: int) -> Iterator[TaskRunner]:
    """Yields a TaskRunner over ``count`` processes; 1 runs in this process. Leaving early drops tasks not begun."""
    if count == 1:
        yield _run_in_process
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.data.prepare.workers", "webdataset"])
    parents_sockets = multiprocessing.util.get_temp_dir()
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_init_worker, initargs=(parents_sockets,))
    try:
        yield lambda function, tasks: _run_in_pool(pool, function, tasks)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_in_process(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    for number, task in enumerate(tasks):
        yield number, function(*task)


def _run_in_pool(
    pool: ProcessPoolExecutor, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[Any]:
    pending = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
    for future in as_completed(pending):
        yield pending.pop(future), future.result()


def _init_worker(parents_sockets: str) -> None:
    """Initialise a worker: single-threaded tokenizer, ignore Ctrl-C (the parent decides), exit with the parent.

    ``parents_sockets`` is multiprocessing's folder of sockets, which a killed parent leaves in the temporary directory.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        shutil.rmtree(parents_sockets, ignore_errors=True)
        os._exit(ExitCode.FAILURE)

    threading.Thread(target=exit_with_parent, daemon=True).start()
