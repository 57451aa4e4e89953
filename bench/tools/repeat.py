"""Two runs of one configuration: whether they are equal bit for bit, by every logged number and every saved tensor.

    python -m bench.tools.repeat [--out FILE] [key=value ...]

Each is the command ``train`` in a process of its own, on one worker, with as many steps as the keys say.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.tools import goals, results
from cluster.chaos.train_process import COMPARABLE_SETTINGS, TrainProcess, with_settings
from train.config import load as configuration
from train.distributed.param_shard import MASTER
from train.run_dir import compare

USUAL = ["model=gpt_tiny", "batch.seq_len=64", "batch.global=8", "steps=8", "cluster.workers=1", "tracking=off"]


def train_once(folder: Path, overrides: list[str]) -> str:
    """Makes a run from its beginning to its end; returns the SHA-256 of its weights."""
    run = TrainProcess(folder, overrides)
    run.start()
    run.wait_until(lambda: run.ended and run.exit_code == 0, "its end")
    steps = configuration.load(overrides).steps
    reader = compare.checkpoint_of(folder, steps).reader()
    digest = hashlib.sha256()
    for name, kind in sorted(key for key in reader.pieces if key[1] == MASTER):
        digest.update(reader.read(name, kind, 0, reader.pieces.numel(name, kind)).numpy())
    return digest.hexdigest()


def measure(overrides: list[str]) -> dict[str, Any]:
    """Makes both runs; returns the row."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("a", "b")]
        hashes = [train_once(folder, overrides) for folder in folders]
        steps = configuration.load(overrides).steps
        subjects = [dataclasses.asdict(subject) for subject in compare.compare(*folders, steps)]
    equal = hashes[0] == hashes[1] and all(subject["difference"] is None for subject in subjects)
    return {"overrides": overrides, "steps": steps, "equal": equal, "weights": hashes, "compared": subjects}


def main(arguments: list[str]) -> int:
    """Measures and appends the row. Returns 0 when the runs are equal, ``goals.MISSED`` when they are not."""
    parser = argparse.ArgumentParser(prog="bench.tools.repeat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the row")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration of both")
    options = parser.parse_args(arguments)
    given = {word.partition("=")[0] for word in options.overrides}
    usual = [word for word in USUAL if word.partition("=")[0] not in given]
    row = measure(with_settings([*usual, *options.overrides], COMPARABLE_SETTINGS))
    out = Console(soft_wrap=True, highlight=False)
    for subject in row["compared"]:
        out.print(f"{subject['subject']}: {subject['difference'] or 'equal'} ({subject['compared']} compared)")
    out.print(f"weights {row['weights'][0]}\n    and {row['weights'][1]}")
    if options.out:
        about = results.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        results.append(options.out, [{"bench": "repeat"} | about | row])
    return 0 if row["equal"] else goals.MISSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
