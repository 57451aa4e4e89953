"""Seconds from the end of one trial of a sweep to the first step of the next, by part.

    ./launch.sh bench turnover [--trials 12] [--out runs/bench_turnover] [key=value ...]

Small runs, one after the other on the same slots.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from train.config.sweep_dir import LEDGER, trial_dir

MODEL = ("experiment=scaling", "model.width=32", "model.heads=2", "model.mlp_width=88", "steps=20", "keep_last=1")


def between(folder: Path) -> list[dict[str, float]]:
    """Seconds of each part, for every trial but the first."""
    records = [json.loads(line) for line in (folder / LEDGER).read_text("utf-8").splitlines()]
    turnovers, ended = [], None
    for record in records:
        if record["event"] == "end":
            ended = record["t"]
        elif record["event"] == "start" and ended is not None:
            marks = json.loads((trial_dir(folder, record["trial"]) / "startup.json").read_text("utf-8"))
            turnovers.append(
                {
                    "places": record["t"] - ended,
                    "stewards": marks["workers"],
                    "fork": marks["start"] - marks["workers"],
                    "to the first step": marks["first_step_done"] - marks["start"],
                    "in all": record["t"] - ended + marks["first_step_done"],
                }
            )
    return turnovers


def main(arguments: list[str]) -> int:
    """Runs the sweep and prints the medians."""
    parser = argparse.ArgumentParser(prog="bench turnover", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_turnover"))
    options = parser.parse_args(arguments)
    words = [
        *MODEL,
        f"seed=range({options.trials})",
        "sweep.parallel=1",
        f"sweep.dir={options.out}",
        *options.overrides,
    ]
    code = subprocess.run([sys.executable, "-m", "cluster", "train", "-m", *words], check=False).returncode
    if code:
        return code
    rows = between(options.out)
    table = Table("", "median", "least", "most")
    for part in rows[0]:
        values = [row[part] for row in rows]
        table.add_row(part, *(f"{pick(values):.2f} s" for pick in (statistics.median, min, max)))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
