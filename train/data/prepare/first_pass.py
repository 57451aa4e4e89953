"""The first reading of a corpus: every document is found, cleaned, screened and hashed, and duplicates are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from train.config import schema
from train.data.prepare import workers
from train.data.prepare.documents import ReadOptions
from train.data.screening.contamination import GRAM, evaluation_passages
from train.data.screening.near_duplicates import SignatureFile, earlier_twins
from train.data.screening.screen import NEAR, Dropped, ScreenOptions
from train.data.sources.problems import BadText, merged
from train.data.sources.source_files import CorpusFiles, SourceFile
from train.errors import UserError
from train.util.format import plural

ReportProgress = Callable[[dict[str, Any]], None]
"""Called with {"phase": "read" | "tokenizer" | "merges" | "tokenize" | "wait" | "ready", "done": n, "total": m}, bytes,
and with {"phase": "note", "text": what the user should know}.

An exception that it raises ends the work; finished shards are kept.
"""

_SPAN = 4 << 20
"""Bytes of source files that one task of a worker reads."""
_SHOWN = 300
"""Characters of the text of an example."""


@dataclass(frozen=True)
class AllDocuments:
    """The documents of a corpus in order, without duplicates; their characters, if wanted; what was left out."""

    documents: workers.Documents
    characters: str
    set_aside: list[BadText]
    dropped: Dropped


def find_all(
    data: schema.DataConfig,
    files: CorpusFiles,
    options: ReadOptions,
    run_tasks: workers.TaskRunner,
    report: ReportProgress,
) -> AllDocuments:
    """Read all text once. Raises UserError with every problem of every file, or if no text is left."""
    sources = files.sources

    def note(text: str) -> None:
        if text:
            report({"phase": "note", "text": text})

    screening = _screen_options(data, files.evaluation)
    signatures = SignatureFile()
    parts = _read_all(
        data, sources, (options, screening), lambda tasks: _run_wave(tasks, sources, run_tasks, report, signatures)
    )
    merged(part.problems for part in parts).raise_all()
    skipped = merged(part.skipped for part in parts).as_note("data.bad" if options.skip_files else "data.bad_rows")
    documents = np.concatenate([part.documents for part in parts])[: data.max_documents]
    dropped = Dropped()
    for part in parts:
        dropped.merge(part.dropped)
    if not len(documents):
        total = sum(file.size for file in sources)
        more = [skipped, dropped.as_note() if dropped.counts else ""]
        raise UserError(
            f"the corpus is empty: no text is left after cleaning in {plural(len(sources), 'file')} of {total:,} bytes"
            + "".join(f"; {words}" for words in more if words)
        )
    note(skipped)
    kept = np.arange(len(documents))
    if data.dedup:
        kept = np.sort(np.unique(documents["hash"], axis=0, return_index=True)[1])
    if data.near_dedup:
        numbers = np.concatenate([part.signatures for part in parts])[: data.max_documents]
        twins = kept[earlier_twins(signatures.rows(), numbers[kept])]
        for document, twin in zip(documents[kept[twins < kept]], documents[twins[twins < kept]], strict=True):
            dropped.add(NEAR, _near_example(sources, options, document, twin))
        kept = kept[twins == kept]
    note(dropped.as_note() if dropped.counts else "")
    characters = "".join(sorted(frozenset().union(*(part.characters for part in parts))))
    aside = [problem for part in parts for problem in part.set_aside]
    return AllDocuments(documents[kept], characters, aside, dropped)


def _screen_options(data: schema.DataConfig, evaluation: list[SourceFile]) -> ScreenOptions:
    """What documents are screened for. Raises UserError for evaluation files without a passage."""
    try:
        if evaluation and not evaluation_passages(tuple(evaluation)):
            raise UserError(
                f"data.decontaminate={data.decontaminate}: no text of {GRAM} words or more is in these files"
            )
    except BadText as problem:
        raise UserError(f"data.decontaminate: {problem}") from None
    return ScreenOptions(tuple(data.filters), data.near_dedup, tuple(evaluation))


def _read_all(
    data: schema.DataConfig,
    sources: list[SourceFile],
    options: tuple[ReadOptions, ScreenOptions],
    run_wave: Callable[[list[Any]], list[workers.FoundDocuments]],
) -> list[workers.FoundDocuments]:
    """What all files have, in order; where few documents are wanted, of as many files as have them."""
    most = int(data.max_documents or workers.WHOLE)
    tasks = [(spans, *options, data.tokenizer.kind == "chars", most) for spans in _group_spans(sources)]
    parts = list[workers.FoundDocuments]()
    for group in _waves(tasks, data.max_documents):
        parts += run_wave(group)
        if sum(len(part.documents) for part in parts) >= most:
            break
    return parts


def _run_wave(
    tasks: list[Any],
    sources: list[SourceFile],
    run_tasks: workers.TaskRunner,
    report: ReportProgress,
    signatures: SignatureFile,
) -> list[workers.FoundDocuments]:
    """The results of tasks, in their order; their signatures are numbers of rows in the file that holds them."""
    results: dict[int, workers.FoundDocuments] = {}
    total, before = sum(file.size for file in sources), _bytes_before(tasks, sources)
    for number, part in run_tasks(workers.find_documents, tasks):
        results[number] = replace(part, signatures=signatures.append(part.signatures))
        before += part.read
        report({"phase": "read", "done": before, "total": total})
    return [results[number] for number in range(len(tasks))]


def _bytes_before(tasks: list[Any], sources: list[SourceFile]) -> int:
    """The bytes of all files before the first span of some tasks."""
    first = tasks[0][0][0]
    return sum(file.size for file in sources[: first.number]) + int(first.begin)


def _near_example(
    sources: list[SourceFile], options: ReadOptions, document: np.void, twin: np.void
) -> Callable[[], dict[str, Any]]:
    """Makes the example of a near-duplicate: where it lies, which earlier document it is like, and its beginning."""

    def example() -> dict[str, Any]:
        file, other = sources[int(document["file"])], sources[int(twin["file"])]
        pieces = workers.document_pieces(file, document, options)
        text = next((piece for piece in pieces if isinstance(piece, str)), "")[:_SHOWN]
        like = {"file": other.name, "offset": int(twin["offset"])}
        return {"file": file.name, "offset": int(document["offset"]), "like": like, "text": text}

    return example


def _waves(tasks: list[Any], most: int | None) -> Iterator[list[Any]]:
    """The tasks in groups that follow each other: one, or where few documents are wanted each of twice as many."""
    begin, count = 0, 1 if most else len(tasks)
    while begin < len(tasks):
        yield tasks[begin : begin + count]
        begin, count = begin + count, 2 * count


def _group_spans(sources: list[SourceFile]) -> Iterator[list[workers.ByteSpan]]:
    """Lists of spans of about _SPAN bytes, in order: small files share a list, large files of lines are cut."""
    group: list[workers.ByteSpan] = []
    for number, file in enumerate(sources):
        step = _SPAN if file.divisible else max(file.size, 1)
        for begin in range(0, max(file.size, 1), step):
            group.append(workers.ByteSpan(number, file, begin, min(begin + step, file.size)))
            if sum(span.end - span.begin for span in group) >= _SPAN:
                yield group
                group = []
    if group:
        yield group
