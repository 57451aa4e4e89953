"""Work of `prepare`'s processes: find documents in a span of bytes, write a shard; and their pool.

Nothing here imports torch, so that the processes start fast. Arguments and results are small: positions of documents,
never their text.
"""

from __future__ import annotations

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
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.shards import Ids, ShardEntry, write_shard
from train.data.prepare.problems import BadText, Problems
from train.data.prepare.sources import CHANGED, LABEL, Pieces, ReadOptions, SourceFile, read_document, read_span
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
    """The documents of some spans in order, problems of reading, rows left out, characters if wanted, bytes read."""

    documents: Documents
    problems: Problems
    skipped: Problems
    characters: frozenset[str]
    read: int


def find_documents(spans: list[ByteSpan], options: ReadOptions, with_characters: bool) -> FoundDocuments:
    """Read, clean and hash every document that begins in the spans; empty documents are left out."""
    rows: list[tuple[Any, ...]] = []
    problems, skipped = Problems(), Problems()
    characters: set[str] | None = set() if with_characters else None
    for span in spans:
        try:
            for offset, length, pieces in read_span(span.file, span.begin, span.end, options):
                try:
                    if measured := _measure(pieces, characters):
                        rows.append((span.number, offset, length, *measured, 0, WHOLE))
                except BadText as problem:
                    (skipped if problem.row and options.skip_rows else problems).add(problem)
        except BadText as problem:
            problems.add(problem)
        except OSError as error:
            problems.add(BadText(span.file.path, error.strerror or str(error)))
    return FoundDocuments(
        *(np.array(rows, DOCUMENT), problems, skipped),
        *(frozenset(characters or ()), sum(span.end - span.begin for span in spans)),
    )


def _measure(pieces: Pieces, characters: set[str] | None) -> tuple[int, tuple[int, int], int] | None:
    """(bytes, hash, split_hash) of a document, as DOCUMENT has them, or None if it is empty; adds its characters."""
    size, digest, text_digest = 0, sha256(), None
    for piece in pieces:
        if piece.startswith(LABEL):
            text_digest = digest.copy()
        if characters is not None:
            characters.update(piece.removeprefix(LABEL))
        encoded = piece.encode()
        digest.update(encoded)
        size += len(encoded)
    return (size, _hash128(digest), _hash128(text_digest or digest)[0]) if size else None


def _hash128(digest: Any) -> tuple[int, int]:
    """The first 128 bits of a sha256, as two 64-bit numbers."""
    high, low = struct.unpack(">QQ", digest.digest()[:16])
    return high, low


def document_pieces(file: SourceFile, document: np.void, options: ReadOptions) -> Pieces:
    """The text that one record of DOCUMENT refers to in its file, in pieces, as ``read_document`` gives them.

    Raises UserError, behind the last piece, if the file has changed since: what was made of the others is wrong then.
    """
    begin, end, position, digest = int(document["begin"]), int(document["end"]), 0, sha256()
    for piece in read_document(file, int(document["offset"]), int(document["length"]), options):
        digest.update(piece.encode())
        if part := piece[max(begin - position, 0) : max(end - position, 0)]:
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

    def stored() -> Iterator[tuple[str, int, Iterator[NDArray[Any]]]]:
        for document in job.documents:
            file = job.files[int(document["file"])]
            parts = stored_ids(document_pieces(file, document, job.options))
            yield file.name, int(document["bytes"]), (np.array(ids, job.dtype) for ids in parts)

    def stored_ids(pieces: Pieces) -> Iterator[list[int]]:  # eot, text, eot, and if it has a label that, and eot again
        nonlocal unknown
        yield [tokenizer.eot]
        for is_label, part in groupby(pieces, lambda piece: piece.startswith(LABEL)):
            if is_label:
                yield [tokenizer.eot]
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
