"""A search for a learning rate beside a grid: the loss reached, and the steps spent in all.

    ./launch.sh bench search [--steps 816] [--seeds 0,1,2] [--out runs/bench_search] [key=value ...]

A grid of 16 learning rates from 1e-5 to 1e-1, each trained to the end; then TPE with successive halving
(``sweep=tpe``) between the same ends, once a seed, with half of the grid's steps to spend. All are ordinary sweeps of
one small model on bytes of the embedded corpus, as many trials at once as there are cores. The best of 16 runs owes
something to luck, which is no property of its rate; so each best rate is trained again from three other seeds. The
goal: by their mean no worse a held-out loss than the grid's rate, for the median search. Run again it goes on where it
was.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from train.config.sweep_dir import RESULTS

LOW_EXPONENT, HIGH_EXPONENT, POINTS = -5.0, -1.0, 16
FRESH = ("1001", "1002", "1003")
"""Seeds of the runs that compare the best rates again."""
MODEL = (
    "experiment=scaling",
    "batch.global=16",
    "model.width=48",
    "model.heads=4",
    "model.mlp_width=128",
    "keep_last=1",
)


def sweep(folder: Path, words: list[str]) -> list[dict[str, str]]:
    """Runs or continues a sweep; returns the rows of its results. Diverging trials are results too."""
    command = [sys.executable, "-m", "cluster", "train", "-m", *words, f"sweep.dir={folder}"]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1):
        raise SystemExit(code)
    with (folder / RESULTS).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str]) -> int:
    """Runs all sweeps, prints the table, and returns 0 when the goal is met."""
    parser = argparse.ArgumentParser(prog="bench search", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--steps", type=int, default=816, help="of a trial that is not ended early")
    parser.add_argument("--seeds", default="0,1,2", help="of the searches")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_search"))
    options = parser.parse_args(arguments)
    steps = options.steps
    shared = [*MODEL, f"steps={steps}", f"eval_every={max(1, steps // 8)}", "eval_tokens=8192", *options.overrides]
    rates = [10 ** (LOW_EXPONENT + (HIGH_EXPONENT - LOW_EXPONENT) * n / (POINTS - 1)) for n in range(POINTS)]
    every = "optimizer.lr=" + ",".join(f"{rate:.3g}" for rate in rates)
    between = f"optimizer.lr=tag(log,interval({10**LOW_EXPONENT:g},{10**HIGH_EXPONENT:g}))"
    results = {f"grid of {POINTS}": sweep(options.out / "grid", [*shared, every])}
    for seed in options.seeds.split(","):
        words = [between, "sweep=tpe", "sweep.trials=40", f"sweep.budget={POINTS * steps // 2}", f"sweep.seed={seed}"]
        results[f"TPE, seed {seed}"] = sweep(options.out / f"tpe{seed}", [*shared, *words])
    best = {name: min(finished(rows), key=lambda row: float(row["val_loss"])) for name, rows in results.items()}
    tried = ",".join(dict.fromkeys(row["optimizer.lr"] for row in best.values()))
    again = finished(sweep(options.out / "again", [*shared, f"optimizer.lr={tried}", f"seed={','.join(FRESH)}"]))
    table = Table()
    for column in ("", "trials", "to the end", "steps in all", "best lr", "val_loss", "other seeds", "beside the grid"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    spent, means = [], []
    for name, rows in results.items():
        rate, loss = best[name]["optimizer.lr"], float(best[name]["val_loss"])
        spent.append(sum(int(row["step"]) for row in rows))
        means.append(statistics.mean(float(row["val_loss"]) for row in again if row["optimizer.lr"] == rate))
        cells = (str(len(rows)), str(len(finished(rows))), f"{spent[-1]:,}", f"{float(rate):.3g}", f"{loss:.4f}")
        table.add_row(name, *cells, f"{means[-1]:.4f}", f"{means[-1] - means[0]:+.4f}")
    Console(width=120).print(table)
    gaps = [mean - means[0] for mean in means[1:]]
    most, median = max(spent[1:]) / spent[0], statistics.median(gaps)
    good = f"the rates of {sum(gap <= 0 for gap in gaps)} of {len(gaps)} searches"
    print(
        f"{good} are no worse than the grid's; the median is {median:+.4f} nats from it, "
        f"by means of {len(FRESH)} other seeds"
    )
    met = median <= 0 and most <= 0.5
    print(
        f"goal (median no worse, at most half of the steps; the most were {most:.0%}): " + ("met" if met else "missed")
    )
    return int(not met)


def finished(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of the trials that ran to their last step."""
    return [row for row in rows if row["state"] == "done"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
