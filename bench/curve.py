"""The loss curves of one run or several, drawn from their metrics.jsonl.

    ./launch.sh bench curve runs/a [runs/b ...] [--out docs/figures/loss.png] [--x step|tokens] [--skip STEPS]

Training loss is a line, the held-out loss points joined by dashes, both in nats per token. Losses of runs whose tokenizers
differ are not comparable: the title then says so.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")  # draws files, wherever there is no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from train.tracking import read_records


def series(records: list[dict[str, Any]], x: str, y: str, skip: int) -> tuple[list[float], list[float]]:
    """The places where ``y`` was measured, after ``skip`` steps, and its values."""
    kept = [r for r in records if r.get(y) is not None and r["step"] > skip]
    return [r[x] for r in kept], [r[y] for r in kept]


def draw(axes: Axes, folder: Path, x: str, skip: int) -> None:
    """One run's curves. SystemExit where it has none."""
    records = read_records(folder / "metrics.jsonl")
    if not records:
        raise SystemExit(f"{folder} holds no metrics.jsonl with a line in it: give a run's folder, such as runs/gpt_mini-stdlib")
    (line,) = axes.plot(*series(records, x, "loss", skip), linewidth=1.2, label=f"{folder.name}: training")
    held_out = series(records, x, "val_loss", skip)
    axes.plot(*held_out, "o--", color=line.get_color(), markersize=5, markeredgecolor="black", label=f"{folder.name}: held out")


def title(folders: list[Path]) -> str:
    """Empty, or a warning where the runs have not one tokenizer."""
    files = [folder / "tokenizer.json" for folder in folders]
    found = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
    return "tokenizers differ: not comparable per token" if len(found) > 1 else ""


def main(arguments: list[str]) -> int:
    """Draws the picture and says where it is."""
    parser = argparse.ArgumentParser(prog="bench curve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    parser.add_argument("--x", choices=("step", "tokens"), default="step")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many first steps")
    options = parser.parse_args(arguments)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for folder in options.runs:
        draw(axes, folder, options.x, options.skip)
    axes.set(xlabel={"step": "optimizer step", "tokens": "tokens trained on"}[options.x], ylabel="loss (nats per token)")
    axes.set_title(title(options.runs))
    axes.grid(alpha=0.3)
    axes.legend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
