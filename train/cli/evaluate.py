"""The verb ``evaluate``: metrics of a run's checkpoint on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from train.data.corpus.shards import Corpus
from train.data.loader import held_out_loader, held_out_text
from train.data.mixing.mixture_corpus import open_trained_corpus
from train.distributed import process_group
from train.errors import UserError, shown_name
from train.evaluate import Evaluation, evaluate, gzip_bits_per_byte
from train.reporting.terminal import UserConsole
from train.run_dir.open_run import SavedRun, open_run
from train.util.io import to_json
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
    corpus = open_trained_corpus(RunDir(folder), run.config.model.special)
    world = process_group.init_from_env()
    try:
        held_out = held_out_loader(corpus, run.config, world, split)
        if not held_out.groups:
            raise UserError(
                f"nothing is held out of this corpus as {split} (data.{split}_fraction={_held_out_share(run, split)}, "
                "of whole documents): prepare one with a larger share, or with more and shorter documents"
            )
        evaluation = evaluate(run.objective.to(world.device), held_out, world, lambda: False, run.objective.whole_text)
    finally:
        process_group.destroy_group()
    if not evaluation.sums["loss"][1]:
        raise UserError(
            f"no token is to be predicted in what is held out of this corpus as {split}: its documents are too short, "
            f"or too few. Prepare a corpus of longer ones, or with a larger data.{split}_fraction, and train on it"
        )
    classes = getattr(run.config.objective, "classes", [])
    return EvaluatedRun(evaluation, run.checkpoint.progress.step, evaluation.sums["loss"][1], classes, corpus)


def _held_out_share(run: SavedRun, split: str) -> float:
    data = run.config.data
    return data.val_fraction if split == "val" else data.test_fraction


def run(options: Mapping[str, str], console: UserConsole, *, as_json: bool) -> None:
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
        console.print_json(to_json(more | numbers | evaluated.evaluation.details(evaluated.classes)))
        return
    title = f"{shown_name(options['run.dir'])}, step {evaluated.step}, {evaluated.targets:,} held-out places" + (
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
        packed, size = gzip_bits_per_byte(held_out_text(evaluated.corpus, split))
        table.add_row(f"bits_per_byte of gzip -9, same {size:,} bytes", f"{packed:.4f}")
    console.print(table)
