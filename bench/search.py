"""A search for a learning rate beside a grid: how good, and after how many steps in all.

    ./launch.sh bench search [--steps 270] [--trials 16] [--seed 0] [--out runs/bench_search] [key=value ...]

A grid of 16 learning rates from 1e-5 to 1e-1, each trained to the end; then TPE with successive halving (``sweep=tpe``) between the
same ends. Both are ordinary sweeps of one small model on bytes of the embedded corpus, as many trials at once as there are cores.
The goal: no worse a held-out loss after no more than half of the steps.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

LOW_EXPONENT, HIGH_EXPONENT, POINTS = -5.0, -1.0, 16
MODEL = ("experiment=scaling", "model.width=48", "model.heads=4", "model.mlp_width=128", "keep_last=1")


def sweep(folder: Path, words: list[str]) -> tuple[list[dict[str, str]], float]:
    """The rows of the results of a sweep, and the seconds that it took. It may have diverging trials: that is a result."""
    began = time.monotonic()
    command = [sys.executable, "-m", "cluster", "train", "-m", *words, f"sweep.dir={folder}"]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1):
        raise SystemExit(code)
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file)), time.monotonic() - began


def main(arguments: list[str]) -> int:
    """Runs both, prints the table, and returns 0 when the goal is met."""
    parser = argparse.ArgumentParser(prog="bench search", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--steps", type=int, default=270, help="of a trial that is not ended early")
    parser.add_argument("--trials", type=int, default=16, help="of the search")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_search"))
    options = parser.parse_args(arguments)
    shutil.rmtree(options.out, ignore_errors=True)
    steps = options.steps
    shared = [*MODEL, f"steps={steps}", f"eval_every={max(1, steps // 9)}", "eval_tokens=8192", *options.overrides]
    rates = [10 ** (LOW_EXPONENT + (HIGH_EXPONENT - LOW_EXPONENT) * n / (POINTS - 1)) for n in range(POINTS)]
    every = "optimizer.lr=" + ",".join(f"{rate:.3g}" for rate in rates)
    between = f"optimizer.lr=tag(log,interval({10**LOW_EXPONENT:g},{10**HIGH_EXPONENT:g}))"
    found = {
        f"grid of {POINTS}": sweep(options.out / "grid", [*shared, every]),
        "TPE, pruned": sweep(
            options.out / "tpe", [*shared, between, "sweep=tpe", f"sweep.trials={options.trials}", f"sweep.seed={options.seed}"]
        ),
    }
    table = Table()
    for column in ("", "trials", "to the end", "steps in all", "best lr", "val_loss", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    spent, losses = [], []
    for name, (rows, seconds) in found.items():
        done = [row for row in rows if row["state"] == "done"]
        best = min(done, key=lambda row: float(row["val_loss"]))
        spent.append(sum(int(row["step"]) for row in rows))
        losses.append(float(best["val_loss"]))
        cells = (str(len(rows)), str(len(done)), f"{spent[-1]:,}", f"{float(best['optimizer.lr']):.3g}", f"{losses[-1]:.4f}")
        table.add_row(name, *cells, f"{seconds:.0f}")
    Console().print(table)
    met = losses[1] <= losses[0] and spent[1] <= spent[0] / 2
    print(f"the search's best is {losses[1] - losses[0]:+.4f} nats from the grid's, after {spent[1] / spent[0]:.0%} of its steps")
    print("goal (no worse, at most half of the steps): " + ("met" if met else "missed"))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
