"""Which documents are in a step, computed from a run's configuration and corpus."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.mixing.mixture_corpus import open_trained_corpus
from train.data.sampling.batch_plan import Cursor, StepPlan
from train.errors import UserError
from train.stability.skipped_rows import read_skipped, rows_of
from train.util.run_layout import RunDir

WORDS_SHOWN = 24
"""Tokens at the beginning of a part that are decoded to show its first words."""


@dataclass(frozen=True)
class DocumentPart:
    """The part of a document that is in one row of a step."""

    row: int
    stream: int
    document: str
    """The key of its sample in the shards, after the name of its source in a mixture."""
    source: str
    """The file that the document was read from."""
    tokens: tuple[int, int]
    """Range [first, end) of the document's tokens that are predicted; one beyond the last is the end of the text."""
    epoch: int
    """How often it, or its source in a mixture, was read before."""
    skipped: bool
    words: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of its row that are stored beside it: data.meta_keys."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON; without those of the row where there are none."""
        values = asdict(self)
        return values if self.fields else {key: value for key, value in values.items() if key != "fields"}


def documents_of_step(
    corpus: Corpus, plan: StepPlan, cursor: Cursor, skipped: Collection[int] = ()
) -> list[DocumentPart]:
    """The documents of the step at a cursor, row by row; ``skipped`` are the rows that ``skipped.jsonl`` leaves out."""
    split, parts = corpus.split("train"), []
    for row, sample, start, length in plan.step_table(cursor).tolist():
        text = split.document(sample, start, start + min(length, WORDS_SHOWN))
        words = " ".join(corpus.tokenizer.decode(text.tolist()).split())
        span = (start, start + length)
        document, epoch = split.name_of(sample)
        about = split.about(sample)
        source = str(about.pop("source"))
        about.pop("bytes", None)
        where = row, row % plan.shape.streams, document, source, span, cursor.epoch + epoch
        parts.append(DocumentPart(*where, row in skipped, words, about))
    return parts


def trace_step(folder: Path, step: int) -> tuple[str, list[DocumentPart]]:
    """The data_hash of a step of the run in ``folder``, counted as in metrics.jsonl, and the documents in it.

    Raises UserError for a step that the run does not have, and a corpus that is not the run's.
    """
    run_dir = RunDir(folder)
    config = configuration.read(run_dir.config)
    if not 1 <= step <= config.steps:
        raise UserError(f"step={step}: {folder} has the steps 1 to {config.steps}")
    corpus = open_trained_corpus(run_dir)
    plan = training_loader(corpus, config, RankShare(0, 1, 1)).plan
    cursor = plan.after(Cursor(), step - 1)
    skipped = rows_of(read_skipped(run_dir.skipped)).get(cursor, frozenset())
    return plan.data_hash(cursor, skipped), documents_of_step(corpus, plan, cursor, skipped)
