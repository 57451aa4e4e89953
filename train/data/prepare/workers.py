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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.shards import Ids, ShardEntry, write_shard
from train.data.prepare.problems import BadText, Problems
from train.data.prepare.sources import CHANGED, LABEL, ReadOptions, SourceFile, read_document, read_span
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
    characters: set[str] = set()
    for span in spans:
        try:
            for offset, length, text in read_span(span.file, span.begin, span.end, options):
                if isinstance(text, BadText):
                    (skipped if text.row and options.skip_rows else problems).add(text)
                elif text:
                    encoded = text.encode()
                    split_hash = _hash128(text.partition(LABEL)[0].encode())[0]
                    rows.append((span.number, offset, length, len(encoded), _hash128(encoded), split_hash, 0, WHOLE))
                    if with_characters:
                        characters.update(text.replace(LABEL, ""))
        except OSError as error:
            problems.add(BadText(span.file.path, error.strerror or str(error)))
    return FoundDocuments(
        *(np.array(rows, DOCUMENT), problems, skipped),
        *(frozenset(characters), sum(span.end - span.begin for span in spans)),
    )


def _hash128(encoded: bytes) -> tuple[int, int]:
    """The first 128 bits of the sha256, as two 64-bit numbers."""
    high, low = struct.unpack(">QQ", sha256(encoded).digest()[:16])
    return high, low


def document_text(files: dict[int, SourceFile], document: np.void, options: ReadOptions) -> str:
    """The text that one record of DOCUMENT refers to. Raises UserError if the file has changed since."""
    file = files[int(document["file"])]
    text = read_document(file, int(document["offset"]), int(document["length"]), options)
    if _hash128(text.encode()) != tuple(document["hash"].tolist()):
        raise UserError(f"{file.path}: {CHANGED}")
    return text[int(document["begin"]) : int(document["end"])]


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


def encode_shard(job: ShardJob) -> tuple[ShardEntry, Ids]:
    """Tokenise the documents of a shard and write it beside the tokenizer."""
    tokenizer = _tokenizer(job.path.parent)

    def stored() -> Iterator[tuple[str, int, NDArray[Any]]]:
        for document in job.documents:
            text = document_text(job.files, document, job.options)
            ids = [tokenizer.eot]
            for part in text.split(LABEL):
                ids += [*tokenizer.encode(part), tokenizer.eot]
            yield job.files[int(document["file"])].name, len(text.encode()), np.array(ids, job.dtype)

    return write_shard(job.path, job.first, stored())


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
