"""What a corpus is made of: its documents, found and cleaned, without repeats, and which of them are held out."""

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
from train.data.prepare.sources import ReadOptions, SourceFile, complain
from train.errors import UserError
from train.util.format import plural

Report = Callable[[dict[str, Any]], None]
"""Told {"phase": "read" | "tokenizer" | "tokenize" | "wait" | "ready", "done": n, "total": m (bytes)}.

What it raises ends the work; finished shards are kept.
"""

_SPAN = 4 << 20


@dataclass(frozen=True)
class CorpusSpec:
    """What a corpus is made of: settings, documents and their split. Two equal recipes make equal corpora."""

    digest: str
    settings: dict[str, Any]
    splits: dict[str, workers.Documents]
    characters: str


def settings(data: schema.DataConfig) -> dict[str, Any]:
    """The keys of ``data`` that decide what the shards hold, and of labelled text what is held out by."""
    keys = {"source", "text_key", "encoding_errors", "dedup", "val_fraction", "tokenizer", "shard_tokens"}
    chosen = data.model_dump(include=keys) | ({"label_key": data.label_key, "place": "text"} if data.label_key else {})
    return chosen | ({"test_fraction": data.test_fraction} if data.test_fraction else {})


def build_spec(
    data: schema.DataConfig, sources: list[SourceFile], how: ReadOptions, run: workers.Run, report: Report
) -> CorpusSpec:
    """Read all text once, as ``how`` says. Raises UserError with every problem of every file, or if nothing is left."""
    total = sum(file.size for file in sources)
    given = tokenizer.given_tokenizer(data.tokenizer) if data.tokenizer.kind == "file" else ""
    tasks = [(spans, how, data.tokenizer.kind == "chars") for spans in _spans(sources)]
    found: dict[int, workers.FoundDocuments] = {}
    done = 0
    for number, part in run(workers.find_documents, tasks):
        found[number] = part
        done += part.read
        report({"phase": "read", "done": done, "total": total})
    parts = [found[number] for number in range(len(tasks))]
    complain([problem for part in parts for problem in part.problems])
    documents = np.concatenate([part.documents for part in parts])
    if not len(documents):
        raise UserError(
            f"the corpus is empty: no text is left after cleaning in {plural(len(sources), 'file')} of {total:,} bytes"
        )
    if data.dedup:
        documents = documents[np.sort(np.unique(documents["hash"], axis=0, return_index=True)[1])]
    names = sha256(json.dumps([sources[number].name for number in documents["file"]]).encode()).hexdigest()
    chosen = settings(data)
    described = [shards.VERSION, clean.VERSION, chosen, sha256(given.encode()).hexdigest(), names]
    digest = sha256(json.dumps(described).encode() + documents["hash"].tobytes()).hexdigest()
    characters = "".join(sorted(frozenset().union(*(part.characters for part in parts))))
    return CorpusSpec(digest, chosen, _split(documents, data, sources, how), characters)


def _spans(sources: list[SourceFile]) -> Iterator[list[workers.Span]]:
    """Lists of spans of about _SPAN bytes, in order: small files together, large files of lines in pieces."""
    group: list[workers.Span] = []
    for number, file in enumerate(sources):
        step = _SPAN if file.lines else max(file.size, 1)
        for begin in range(0, max(file.size, 1), step):
            group.append(workers.Span(number, file, begin, min(begin + step, file.size)))
            if sum(span.end - span.begin for span in group) >= _SPAN:
                yield group
                group = []
    if group:
        yield group


def _split(
    documents: workers.Documents, data: schema.DataConfig, sources: list[SourceFile], how: ReadOptions
) -> dict[str, workers.Documents]:
    """Hold out the documents whose place, the hash of the text as a number in [0, 1), lies below ``data.val_fraction``.

    Those of the next ``data.test_fraction`` are kept for the end. A label has no say: a text stays on its side whatever is added to
    the corpus, and in every corpus of these fractions, labelled or not. Neither training nor held-out text may be none: of several
    documents the one of lowest place is held out (the one of highest trained on); a single one is cut, its end held out.
    """
    kept = {"test": documents[:0]} if data.test_fraction else {}
    if not data.val_fraction + data.test_fraction:
        return {"train": documents, "val": documents[:0]}
    if len(documents) == 1:
        text = workers.text_of(dict(enumerate(sources)), documents[0], how)
        middle = int(len(text) * (1 - data.val_fraction))
        train, val = documents.copy(), documents.copy()
        train["end"], val["begin"] = middle, middle
        train["bytes"] = len(text[:middle].encode())
        val["bytes"] = len(text[middle:].encode())
        return {"train": train, "val": val} | kept
    places = documents["place"].astype(np.float64) / 2.0**64
    held, tested = places < data.val_fraction, places < data.val_fraction + data.test_fraction
    if data.val_fraction:
        held[np.argmin(places)] = True
    tested[np.argmax(places)] = held[np.argmax(places)] = False
    chosen = {"train": documents[~(held | tested)], "val": documents[held]}
    return chosen | ({"test": documents[tested & ~held]} if data.test_fraction else {})
