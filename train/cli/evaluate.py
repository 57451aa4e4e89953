"""The verb ``evaluate``: metrics of a run's checkpoint on held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.data.corpus.shards import Corpus
from train.data.loader import held_out_loader, held_out_text
from train.distributed import process_group
from train.errors import UserError
from train.evaluate import Evaluation, evaluate, gzip_bits_per_byte
from train.run_dir.open_run import open_run
from train.util.run_layout import RunDir


@dataclass(frozen=True)
class EvaluatedRun:
    """Evaluation of a run's checkpoint on a split of its corpus."""

    evaluation: Evaluation
    step: int
    targets: int
    classes: list[str]
    corpus: Corpus


def evaluate_run(folder: Path, which: str, split: str) -> EvaluatedRun:
    """Evaluate checkpoint ``which`` of the run in ``folder`` on all of ``split``, "val" or "test". Raises UserError."""
    run = open_run(folder, which)
    about = json.loads(RunDir(folder).corpus.read_text("utf-8"))
    corpus = Corpus(about["folder"], run.config.model.special)
    if corpus.fingerprint != about["fingerprint"]:
        raise UserError(f"{about['folder']} is not the corpus that {folder} was trained on: prepare that one again")
    world = process_group.init_from_env()
    try:
        held_out = held_out_loader(corpus, run.config, world, split)
        if not held_out.groups:
            raise UserError(
                f"nothing was held out of this corpus (data.{split}_fraction=0): there is nothing to evaluate on"
            )
        sums = evaluate(run.objective.to(world.device), held_out, world, lambda: False)
    finally:
        process_group.destroy_group()
    evaluation = Evaluation(sums, held_out.bytes if run.objective.whole_text else None)
    classes = getattr(run.config.objective, "classes", [])
    return EvaluatedRun(evaluation, run.checkpoint.progress.step, sums["loss"][1], classes, corpus)


def run(options: Mapping[str, str], console: Console, *, as_json: bool) -> None:
    """Evaluate as ``options`` say, and print a table or JSON. Raises UserError."""
    split = options["split"]
    if split not in ("val", "test"):
        raise UserError(
            f"split={split}: there is val, by which the best checkpoint is chosen, and test (data.test_fraction)"
        )
    evaluated = evaluate_run(Path(options["run.dir"]), options["checkpoint"], split)
    numbers = evaluated.evaluation.numbers()
    if as_json:
        more: dict[str, Any] = {"step": evaluated.step, "split": split, "places": evaluated.targets}
        console.print_json(data=more | numbers | evaluated.evaluation.details(evaluated.classes))
        return
    title = f"{options['run.dir']}, step {evaluated.step}, {evaluated.targets:,} held-out places" + (
        ", test" if split == "test" else ""
    )
    table = Table(title=title, title_justify="left")
    for column in ("measure", "value"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    perplexity = evaluated.evaluation.perplexity
    table.add_row("loss (nats per token)" if perplexity else "loss", f"{numbers.pop('val_loss'):.4f}")
    if perplexity:
        table.add_row("perplexity", f"{perplexity:.2f}")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4f}")
    if evaluated.evaluation.bytes:
        text = b"".join(held_out_text(evaluated.corpus, split))
        table.add_row(f"bits_per_byte of gzip -9, same {len(text):,} bytes", f"{gzip_bits_per_byte(text):.4f}")
    console.print(table)
