"""Which documents stood in a step: arithmetic over a run's folder and corpus, nothing is replayed."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.sampling.batch_plan import BatchPlan, Cursor
from train.errors import UserError
from train.stability.skipped_rows import rows_of
from train.util.io import read_records
from train.util.run_layout import RunDir

WORDS_SHOWN = 24
"""Tokens of a part that its first words are decoded from."""


@dataclass(frozen=True)
class DocumentPart:
    """A part of a document in a row of a step."""

    row: int
    stream: int
    document: str
    """The key of its sample in the shards."""
    source: str
    """The file that it came from."""
    tokens: tuple[int, int]
    """Which tokens of the document are predicted, [first, end); one beyond the last is the end of the text."""
    skipped: bool
    words: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def documents_of_step(
    corpus: Corpus, plan: BatchPlan, cursor: Cursor, skipped: Collection[int] = ()
) -> list[DocumentPart]:
    """What stands in the step at a cursor, row by row; ``skipped`` are the rows that a ledger leaves out."""
    shards, found = corpus.split("train"), []
    for row, sample, start, length in plan.table(cursor).tolist():
        text = shards.document(sample)[start : start + min(length, WORDS_SHOWN)]
        words = " ".join(corpus.tokenizer.decode(text.tolist()).split())
        span = (start, start + length)
        document = f"train/{sample:09d}"
        found.append(
            DocumentPart(row, row % plan.shape.streams, document, shards.source(sample), span, row in skipped, words)
        )
    return found


def trace_step(folder: Path, step: int) -> tuple[str, list[DocumentPart]]:
    """The data_hash of a step of the run in ``folder``, counted as in metrics.jsonl, and the documents that stand in it.

    Raises UserError for a step that the run does not have, and a corpus that is not the run's.
    """
    run_dir = RunDir(folder)
    config = configuration.read(run_dir.config)
    if not 1 <= step <= config.steps:
        raise UserError(f"step={step}: {folder} has the steps 1 to {config.steps}")
    about = json.loads(run_dir.corpus.read_text())
    corpus = Corpus(about["folder"])
    if corpus.fingerprint != about["fingerprint"]:
        raise UserError(f"{about['folder']} is not the corpus that {folder} was trained on: prepare that one again")
    plan = training_loader(corpus, config, RankShare(0, 1, 1)).plan
    cursor = plan.after(Cursor(), step - 1)
    skipped = rows_of(read_records(run_dir.skipped)).get(cursor, frozenset())
    return plan.data_hash(cursor, skipped), documents_of_step(corpus, plan, cursor, skipped)
