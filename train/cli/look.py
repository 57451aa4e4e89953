"""The verb ``look``: rows of the first step as they are trained, every token with whether it is a target."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from train.batch import IGNORE, Batch
from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.prepare.progress_bar import prepare_with_progress
from train.data.sampling.batch_plan import Cursor
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.reporting.terminal import UserConsole
from train.util.format import plural
from train.util.io import write_whole

TRAINED, READ = "bold green", "dim"
_PAGE = """<!doctype html><meta charset="utf-8"><title>Rows as trained</title>
<style>body{{font:15px/1.5 monospace;margin:2em;max-width:110em}}h2{{font-size:1em}}
p{{white-space:pre-wrap;margin:.4em 0;padding:.4em;border-left:3px solid #999}}
b{{background:#bfe8c4;color:#05320c;font-weight:600}}i{{font-style:normal;color:#777}}</style>
<h1>Rows as trained</h1><div><b>target</b> <i>read only</i>; a bar is a document that sees no other</div>
{body}
"""


@dataclass(frozen=True)
class ShownRow:
    """One row: its documents, each as (text, whether it is a target) of its tokens in order."""

    documents: list[list[tuple[str, bool]]]
    tokens: int
    targets: int
    room: int

    @property
    def title(self) -> str:
        """Counts of the row in words."""
        return (
            f"{plural(len(self.documents), 'document')}, {self.tokens} of {self.room} tokens, "
            f"{plural(self.targets, 'target')}"
        )


def run(overrides: Sequence[str], out: UserConsole) -> None:
    """Show the rows; ``html=FILE`` and ``rows=N`` are taken from the overrides of a run. Raises UserError."""
    own = {"html": "", "rows": "4"}
    for override in overrides:
        key, _, value = override.partition("=")
        own |= {key: value} if key in own else {}
    if not own["rows"].isdecimal() or own["rows"] == "0":
        raise UserError(f"rows={own['rows']} is no number of rows: rows=4")
    config = configuration.load([o for o in overrides if o.partition("=")[0] not in own])
    if config.objective.name != "causal":
        raise UserError(f"look shows rows of objective=causal, and objective={config.objective.name} is set")
    corpus = Corpus(prepare_with_progress(config.data, out, config.objective))
    loader = training_loader(corpus, config, RankShare(0, 1, config.batch.global_))
    rows = shown_rows(loader.peek(Cursor())[0], corpus.tokenizer)[: int(own["rows"])]
    if own["html"]:
        write_whole(Path(own["html"]), as_page(rows).encode())
        out.print(f"{plural(len(rows), 'row')} written to {own['html']}")
        return
    for number, row in enumerate(rows):
        out.print(Text(f"row {number}: {row.title}", "bold"))
        for document in row.documents:
            out.print(Text.assemble("| ", *((text, TRAINED if target else READ) for text, target in document)))


def shown_rows(batch: Batch, tokenizer: Tokenizer) -> list[ShownRow]:
    """The rows of a micro-batch of the causal objective, padding left out.

    A document's last target is no input of the row, and is shown behind its inputs.
    """
    shown = []
    for tokens, targets, segments in zip(
        *(batch[key].tolist() for key in ("tokens", "targets", "segments")), strict=True
    ):
        documents: list[list[tuple[str, bool]]] = []
        for at, segment in enumerate(segments):
            if not segment:
                continue
            begins = at == 0 or segments[at - 1] != segment
            if begins:
                documents.append([])
            target = not begins and targets[at - 1] != IGNORE
            documents[-1].append((_text(tokenizer, tokens[at]), target))
            ends = at + 1 == len(segments) or segments[at + 1] != segment
            if ends and targets[at] != IGNORE:
                documents[-1].append((_text(tokenizer, targets[at]), True))
        size, trained = sum(map(bool, segments)), sum(target != IGNORE for target in targets)
        shown.append(ShownRow(documents, size, trained, len(segments)))
    return shown


def as_page(rows: Sequence[ShownRow]) -> str:
    """The rows as a page of HTML that needs nothing else."""
    parts = []
    for number, row in enumerate(rows):
        parts.append(f"<h2>row {number}: {html.escape(row.title)}</h2>")
        for document in row.documents:
            spans = (
                f"<{'b' if target else 'i'}>{html.escape(text)}</{'b' if target else 'i'}>" for text, target in document
            )
            parts.append(f"<p>{''.join(spans)}</p>")
    return _PAGE.format(body="\n".join(parts))


def _text(tokenizer: Tokenizer, identity: int) -> str:
    """A token as it is read: its text, or its name where it has no text."""
    return tokenizer.decode([identity]) or tokenizer.name_of(identity)
