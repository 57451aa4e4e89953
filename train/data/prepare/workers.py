"""What the processes of `prepare` do: find the documents of a span of bytes, and write one shard.

Nothing here imports torch: these processes start in a moment. All they get and give is small: positions of documents,
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

from train.data.corpus.shards import Entry, Ids, write_shard
from train.data.prepare.sources import CHANGED, LABEL, BadText, Reading, SourceFile, read_document, read_span
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.errors import UserError

DOCUMENT = np.dtype(
    [
        ("file", "<i4"),  # number in the list of files
        ("offset", "<i8"),  # where it begins in the file, bytes
        ("length", "<i8"),  # what it takes in the file, bytes
        ("bytes", "<i8"),  # of cleaned text
        ("hash", "<u8", (2,)),  # first 128 bits of the sha256 of the cleaned text, and its label
        ("place", "<u8"),  # first 64 bits of that of the text alone: what is held out is chosen by it
        ("begin", "<i8"),  # the part of the cleaned text that is meant, characters; all of it but where
        ("end", "<i8"),  # one document is cut in two, for training and held out
    ]
)
WHOLE = np.iinfo(np.int64).max

Documents = NDArray[np.void]


@dataclass(frozen=True)
class Span:
    """Bytes [begin, end) of a file, to be searched for documents."""

    number: int
    file: SourceFile
    begin: int
    end: int


@dataclass(frozen=True)
class Found:
    """The documents of some spans, in order; what could not be read; the characters seen, where they are wanted."""

    documents: Documents
    problems: list[str]
    characters: frozenset[str]
    read: int


def find_documents(spans: list[Span], how: Reading, with_characters: bool) -> Found:
    """Read, clean and hash every document of the spans. Empty ones are left out."""
    rows: list[tuple[Any, ...]] = []
    problems: list[str] = []
    characters: set[str] = set()
    for span in spans:
        try:
            for offset, length, text in read_span(span.file, span.begin, span.end, how):
                if isinstance(text, BadText):
                    problems.append(str(text))
                elif text:
                    encoded = text.encode()
                    place = _hash(text.partition(LABEL)[0].encode())[0]
                    rows.append((span.number, offset, length, len(encoded), _hash(encoded), place, 0, WHOLE))
                    if with_characters:
                        characters.update(text.replace(LABEL, ""))
        except OSError as error:
            problems.append(f"{span.file.path}: {error.strerror or error}")
    return Found(
        np.array(rows, DOCUMENT), problems, frozenset(characters), sum(span.end - span.begin for span in spans)
    )


def _hash(encoded: bytes) -> tuple[int, int]:
    """The first 128 bits of the sha256."""
    high, low = struct.unpack(">QQ", sha256(encoded).digest()[:16])
    return high, low


def text_of(files: dict[int, SourceFile], document: np.void, how: Reading) -> str:
    """The text that is meant by one row of DOCUMENT. Raises UserError if the file is no longer what it was."""
    file = files[int(document["file"])]
    text = read_document(file, int(document["offset"]), int(document["length"]), how)
    if _hash(text.encode()) != tuple(document["hash"].tolist()):
        raise UserError(f"{file.path}: {CHANGED}")
    return text[int(document["begin"]) : int(document["end"])]


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: its documents, numbered from ``first`` in their split."""

    path: Path
    first: int
    documents: Documents
    files: dict[int, SourceFile]
    how: Reading
    dtype: str


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def encode_shard(job: ShardJob) -> tuple[Entry, Ids]:
    """Tokenise the documents of a shard and write it; the tokenizer lies beside it."""
    tokenizer = _tokenizer(job.path.parent)

    def stored() -> Iterator[tuple[str, int, NDArray[Any]]]:
        for document in job.documents:
            text = text_of(job.files, document, job.how)
            ids = [tokenizer.eot]
            for part in text.split(LABEL):
                ids += [*tokenizer.encode(part), tokenizer.eot]
            yield job.files[int(document["file"])].name, len(text.encode()), np.array(ids, job.dtype)

    return write_shard(job.path, job.first, stored())


Run = Callable[..., Iterator[Any]]
"""run(function, tasks): (number of the task, ``function(*task)``) for every task, in the order in which they finish."""


@contextmanager
def processes(count: int) -> Iterator[Run]:
    """Yields a ``run`` over ``count`` processes, or over this one. Leaving early drops the tasks not begun."""
    if count == 1:
        yield _run_here
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.data.prepare.workers", "webdataset"])
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_enter, initargs=(multiprocessing.util.get_temp_dir(),)
    )
    try:
        yield lambda function, tasks: _run_there(pool, function, tasks)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_here(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    for number, task in enumerate(tasks):
        yield number, function(*task)


def _run_there(
    pool: ProcessPoolExecutor, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[Any]:
    pending = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
    for future in as_completed(pending):
        yield pending.pop(future), future.result()


def _enter(parents_sockets: str) -> None:
    """Begin a process: one thread for its tokenizer, deaf to Ctrl-C (its parent decides), gone with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        shutil.rmtree(parents_sockets, ignore_errors=True)  # which a killed parent leaves in the temporary directory
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
