"""Between two trials of a sweep: the seconds from the end of one to the first step of the next, and what they are spent on.

    ./launch.sh bench turnover [--trials 12] [--out runs/bench_turnover] [key=value ...]

Small runs, one after the other in the same place.
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

MODEL = ("experiment=scaling", "model.width=32", "model.heads=2", "model.mlp_width=88", "steps=20", "keep_last=1")


def between(folder: Path) -> list[dict[str, float]]:
    """Of each trial but the first, the seconds of each part."""
    records = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    found, ended = [], None
    for record in records:
        if record["event"] == "end":
            ended = record["t"]
        elif record["event"] == "start" and ended is not None:
            marks = json.loads((folder / f"{record['trial']:03}" / "startup.json").read_text())
            found.append(
                {
                    "places": record["t"] - ended,
                    "stewards": marks["workers"],
                    "fork": marks["start"] - marks["workers"],
                    "to the first step": marks["first_step_done"] - marks["start"],
                    "in all": record["t"] - ended + marks["first_step_done"],
                }
            )
    return found


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
