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
from train.data.prepare.documents import ReadOptions, read_options, text_size
from train.data.prepare.first_pass import ReportProgress, find_all
from train.data.sources.problems import BadText
from train.data.sources.source_files import CorpusFiles, describe_reading

_OPTIONAL = {
    *("bad", "encoding", "max_documents", "meta_keys", "name_key"),
    *("decontaminate", "filters", "near_dedup"),
}
"""Keys that are settings of a corpus only where they are given: as in corpora from before there were these keys."""


@dataclass(frozen=True)
class CorpusSpec:
    """Settings, documents and their splits. Equal specs, which have equal digests, make byte-equal corpora."""

    digest: str
    settings: dict[str, Any]
    splits: dict[str, workers.Documents]
    characters: str
    set_aside: list[BadText]
    """Documents and files that could not be read, and were left out."""
    dropped: list[dict[str, Any]]
    """Examples of documents that were left out on purpose."""


def corpus_settings(data: schema.DataConfig) -> dict[str, Any]:
    """The keys of ``data`` that determine the content of a corpus.

    "place" records that labelled documents are split by a hash of their text without the label.
    """
    keys = {"source", "text_key", "encoding_errors", "dedup", "val_fraction", "tokenizer", "shard_tokens"}
    chosen = data.model_dump(include=keys) | ({"label_key": data.label_key, "place": "text"} if data.label_key else {})
    del chosen["tokenizer"]["max_unknown"]
    if data.tokenizer.end_token is None:  # as in corpora that were prepared before there was this key
        del chosen["tokenizer"]["end_token"]
    if data.is_chat:
        chosen |= data.model_dump(include={"template", "row_tokens", "pack"})
    chosen |= {"bad_rows": data.bad_rows} if data.bad_rows != "refuse" else {}
    optional = data.model_dump(include=_OPTIONAL, exclude_defaults=True)
    chosen |= {key: optional[key] for key in sorted(optional)}
    return chosen | ({"test_fraction": data.test_fraction} if data.test_fraction else {})


def build_spec(
    data: schema.DataConfig,
    files: CorpusFiles,
    options: ReadOptions,
    run_tasks: workers.TaskRunner,
    report: ReportProgress,
    template: str = "",
) -> CorpusSpec:
    """Read all text once. Raises UserError with every problem of every file, or if no text is left.

    ``template`` is the digest of a chat template, for a corpus of conversations.
    """

    def note(text: str) -> None:
        report({"phase": "note", "text": text})

    sources = files.sources
    given = tokenizer.given_tokenizer(data.tokenizer, note) if data.tokenizer.kind == "file" else ""
    if data.source == "text":
        note(describe_reading(sources))
    found = find_all(data, files, options, run_tasks, report)
    documents = found.documents
    names = sha256(json.dumps([sources[number].name for number in documents["file"]]).encode()).hexdigest()
    chosen = corpus_settings(data)
    described = [shards.VERSION, clean.VERSION, chosen, sha256(given.encode()).hexdigest(), names]
    described += [template] if template else []
    large = _large_document(documents, data)
    if large is not None and (len(documents) > 1 or data.test_fraction):
        described.append("cut")  # such corpora were split otherwise before
    meta = documents["meta"].tobytes() if options.has_meta else b""
    digest = sha256(json.dumps(described).encode() + documents["hash"].tobytes() + meta).hexdigest()
    splits = _split_documents(
        documents, data, large, lambda row: workers.document_pieces(sources[int(row["file"])], row, options)
    )
    if large is None:
        _note_uneven_splits(splits, data, report)
    return CorpusSpec(digest, chosen, splits, found.characters, found.set_aside, found.dropped.examples)


_Read = Callable[[np.void], Iterator[Any]]
"""The text of a document in pieces."""


def _large_document(documents: workers.Documents, data: schema.DataConfig) -> int | None:
    """The number of the document that has more than half of the text: neither side of a split may have it whole.

    A labelled text is a whole; only where it is the single document it is cut.
    """
    if data.is_chat:
        return None  # a conversation is a whole
    largest = int(np.argmax(documents["bytes"]))
    whole = data.label_key and len(documents) > 1
    return None if whole or 2 * documents["bytes"][largest] <= documents["bytes"].sum() else largest


def _split_documents(
    documents: workers.Documents, data: schema.DataConfig, large: int | None, read: _Read
) -> dict[str, workers.Documents]:
    """Hold out the documents whose hash of the text, as a number in [0, 1), is below ``data.val_fraction``.

    The next ``data.test_fraction`` is the test split. Labels do not enter the hash: a text stays in its split whatever
    is added to the corpus, and in every corpus of these fractions, labelled or not. Neither train nor val is ever
    empty: the document of the lowest hash is in val, that of the highest in train. Where one document, the one numbered
    ``large``, has more than half of the text, it is cut instead, its end held out.
    """
    if not data.val_fraction + data.test_fraction:
        return {"train": documents, "val": documents[:0]}
    fractions = documents["split_hash"].astype(np.float64) / 2.0**64
    held, tested = fractions < data.val_fraction, fractions < data.val_fraction + data.test_fraction
    if large is None:
        if data.val_fraction:
            held[np.argmin(fractions)] = True
        tested[np.argmax(fractions)] = held[np.argmax(fractions)] = False
    chosen = {"train": ~(held | tested), "val": held} | ({"test": tested & ~held} if data.test_fraction else {})
    if large is None:
        return {name: documents[mask] for name, mask in chosen.items()}
    parts = _cut_document(documents[large], data, read)
    splits = {}
    for name, mask in chosen.items():
        rows, mask[large] = documents.copy(), name in parts
        rows[large] = parts.get(name, rows[large])
        splits[name] = rows[mask]
    return splits


def _cut_document(document: np.void, data: schema.DataConfig, read: _Read) -> dict[str, np.void]:
    """The parts of a document, by split: characters, or tokens, [begin, end), and the bytes of their text."""
    options = read_options(data)
    length = sum(map(len, read(document)))
    middle, end = (int(length * (1 - held)) for held in (data.val_fraction + data.test_fraction, data.test_fraction))
    parts = {"train": (0, middle)}
    if data.val_fraction:
        parts["val"] = middle, end
    if data.test_fraction:
        parts["test"] = end, length
    rows = {}
    for name, (first, last) in parts.items():
        rows[name] = document.copy()
        rows[name]["begin"], rows[name]["end"] = first, last if last < length else workers.WHOLE
        rows[name]["bytes"] = sum(text_size(piece, options) for piece in read(rows[name]))
    return rows


def _note_uneven_splits(splits: dict[str, workers.Documents], data: schema.DataConfig, report: ReportProgress) -> None:
    """Say where documents that are held out whole are far from the share of the text that is asked for."""
    total = sum(int(split["bytes"].sum()) for split in splits.values())
    documents = sum(map(len, splits.values()))
    for name, fraction in {"val": data.val_fraction, "test": data.test_fraction}.items():
        share = int(splits[name]["bytes"].sum()) / total if fraction else fraction
        if not fraction / 2 <= share <= 2 * fraction:
            note = (
                f"{name} has {share:.1%} of the text, not the {fraction:.1%} of data.{name}_fraction: documents are "
                f"held out whole, and there are {documents}. More and smaller documents are shared out more evenly"
            )
            report({"phase": "note", "text": note})
