"""The definition of a corpus: settings, documents without duplicates, and their splits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from train.config import schema
from train.data import tokenizer
from train.data.corpus import shards
from train.data.prepare import clean, workers
from train.data.prepare.problems import merged
from train.data.prepare.sources import ReadOptions, SourceFile, describe_reading
from train.errors import UserError
from train.util.format import plural

ReportProgress = Callable[[dict[str, Any]], None]
"""Called with {"phase": "read" | "tokenizer" | "tokenize" | "wait" | "ready", "done": n, "total": m (bytes)},
With "note": words that the user should read, said once.

An exception that it raises ends the work; finished shards are kept.
"""

_SPAN = 4 << 20
"""Bytes of source files that one task of a worker reads."""


@dataclass(frozen=True)
class CorpusSpec:
    """Settings, documents and their splits. Equal specs, which have equal digests, make byte-equal corpora."""

    digest: str
    settings: dict[str, Any]
    splits: dict[str, workers.Documents]
    characters: str


def corpus_settings(data: schema.DataConfig) -> dict[str, Any]:
    """The keys of ``data`` that determine the content of a corpus.

    "place" records that labelled documents are split by a hash of their text without the label.
    """
    keys = {"source", "text_key", "encoding_errors", "dedup", "val_fraction", "tokenizer", "shard_tokens"}
    chosen = data.model_dump(include=keys) | ({"label_key": data.label_key, "place": "text"} if data.label_key else {})
    chosen |= {"bad_rows": data.bad_rows} if data.bad_rows != "refuse" else {}
    return chosen | ({"test_fraction": data.test_fraction} if data.test_fraction else {})


def build_spec(
    data: schema.DataConfig,
    sources: list[SourceFile],
    options: ReadOptions,
    run_tasks: workers.TaskRunner,
    report: ReportProgress,
) -> CorpusSpec:
    """Read all text once. Raises UserError with every problem of every file, or if no text is left."""
    total = sum(file.size for file in sources)
    given = tokenizer.given_tokenizer(data.tokenizer) if data.tokenizer.kind == "file" else ""
    tasks = [(spans, options, data.tokenizer.kind == "chars") for spans in _group_spans(sources)]
    if data.source == "text":
        report({"phase": "read", "done": 0, "total": total, "note": describe_reading(sources)})
    results: dict[int, workers.FoundDocuments] = {}
    done = 0
    for number, part in run_tasks(workers.find_documents, tasks):
        results[number] = part
        done += part.read
        report({"phase": "read", "done": done, "total": total})
    parts = [results[number] for number in range(len(tasks))]
    merged(part.problems for part in parts).raise_all()
    skipped = merged(part.skipped for part in parts).as_note()
    documents = np.concatenate([part.documents for part in parts])
    if not len(documents):
        raise UserError(
            f"the corpus is empty: no text is left after cleaning in {plural(len(sources), 'file')} of {total:,} bytes"
            + (f"; {skipped}" if skipped else "")
        )
    if skipped:
        report({"phase": "read", "done": total, "total": total, "note": skipped})
    if data.dedup:
        documents = documents[np.sort(np.unique(documents["hash"], axis=0, return_index=True)[1])]
    names = sha256(json.dumps([sources[number].name for number in documents["file"]]).encode()).hexdigest()
    chosen = corpus_settings(data)
    described = [shards.VERSION, clean.VERSION, chosen, sha256(given.encode()).hexdigest(), names]
    digest = sha256(json.dumps(described).encode() + documents["hash"].tobytes()).hexdigest()
    characters = "".join(sorted(frozenset().union(*(part.characters for part in parts))))
    return CorpusSpec(digest, chosen, _split_documents(documents, data, sources, options), characters)


def _group_spans(sources: list[SourceFile]) -> Iterator[list[workers.ByteSpan]]:
    """Lists of spans of about _SPAN bytes, in order: small files share a list, large files of lines are cut."""
    group: list[workers.ByteSpan] = []
    for number, file in enumerate(sources):
        step = _SPAN if file.lines else max(file.size, 1)
        for begin in range(0, max(file.size, 1), step):
            group.append(workers.ByteSpan(number, file, begin, min(begin + step, file.size)))
            if sum(span.end - span.begin for span in group) >= _SPAN:
                yield group
                group = []
    if group:
        yield group


def _split_documents(
    documents: workers.Documents, data: schema.DataConfig, sources: list[SourceFile], options: ReadOptions
) -> dict[str, workers.Documents]:
    """Hold out the documents whose hash of the text, as a number in [0, 1), is below ``data.val_fraction``.

    The next ``data.test_fraction`` is the test split. Labels do not enter the hash: a text stays in its split whatever
    is added to the corpus, and in every corpus of these fractions, labelled or not. Neither train nor val is ever
    empty: the document of the lowest hash is in val, that of the highest in train; a single document is cut, its end
    held out.
    """
    test = {"test": documents[:0]} if data.test_fraction else {}
    if not data.val_fraction + data.test_fraction:
        return {"train": documents, "val": documents[:0]}
    if len(documents) == 1:
        text = workers.document_text(dict(enumerate(sources)), documents[0], options)
        middle = int(len(text) * (1 - data.val_fraction))
        train, val = documents.copy(), documents.copy()
        train["end"], val["begin"] = middle, middle
        train["bytes"] = len(text[:middle].encode())
        val["bytes"] = len(text[middle:].encode())
        return {"train": train, "val": val} | test
    fractions = documents["split_hash"].astype(np.float64) / 2.0**64
    held, tested = fractions < data.val_fraction, fractions < data.val_fraction + data.test_fraction
    if data.val_fraction:
        held[np.argmin(fractions)] = True
    tested[np.argmax(fractions)] = held[np.argmax(fractions)] = False
    chosen = {"train": documents[~(held | tested)], "val": documents[held]}
    return chosen | ({"test": documents[tested & ~held]} if data.test_fraction else {})
