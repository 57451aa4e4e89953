"""Peak memory and seconds until a rank's engine holds its weights, drawn or from a checkpoint, by world and ZeRO stage.

    ./launch.sh bench start_memory [--models gpt2_124m] [--workers 1,2] [--stages 0,1,2,3] [--only fresh] [--out FILE]

Every start is one of new processes, a rank each, over gloo on the CPU, in bf16 with AdamW. ``fresh`` draws the weights.
``resumed`` finds, verifies and reads a checkpoint with moments that ``fresh`` has written. The peak is that of the
process (VmHWM), which has torch and DeepSpeed: what these take is said beside it. The seconds are those of the slowest
rank, from a formed process group on.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.mfu import TOKENIZER, Rows
from bench.nanogpt.step import numbers
from bench.saves import world_of
from bench.tools import goals, results
from train.checkpoint import reader
from train.checkpoint.writer import CheckpointWriter
from train.config import load as configuration
from train.distributed import process_group
from train.distributed.param_shard import MASTER
from train.engine.engine import Engine
from train.run import build_engine
from train.state.train_state import TrainState

BYTES_PER_PARAMETER = 16
"""Of a sharded start: weight and gradient in bf16, fp32 master and two moments."""
SHARE, BASE = 1.15, 1.5e9
"""A rank at stage 3 may take SHARE of its bytes, and BASE bytes for libraries, buffers and what comes and goes."""


def start(rank: int, size: int, port: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """One rank's start of an engine, and its save where that is asked for; rank 0 has the numbers of all."""
    torch.set_num_threads(1)
    world = process_group.init_group(rank, size, rank, "cpu", process_group.Rendezvous("127.0.0.1", port))
    keys = [f"model={options.model}", f"zero={options.stage}", f"cluster.workers={size}", "precision=bf16"]
    config = configuration.load([*keys, "optimizer=adamw", "tracking=off"])
    checkpoints, before, began = Path(options.checkpoints), peak_bytes(), time.perf_counter()
    rows, vocabulary = Rows(config.batch.global_ // size), config.model.vocab_size or TOKENIZER
    if options.resumed:
        engine, _ = build_engine(config, vocabulary, world, rows, lambda empty: None)
        found = reader.find_newest(checkpoints, world, print)
        assert found is not None, f"no checkpoint in {checkpoints}"
        reader.restore(found, engine)
    else:
        engine, _ = build_engine(config, vocabulary, world, rows)
    seconds, peak = time.perf_counter() - began, peak_bytes()
    if options.save:
        save(engine, checkpoints, world)
    every_rank = process_group.gather_objects([seconds, peak, before])
    seconds, peak, before = (max(values) for values in zip(*every_rank, strict=True))
    parameters = sum(shape.numel() for shape in engine.shapes.values())
    return {"seconds": seconds, "peak_bytes": peak, "libraries_bytes": before, "parameters": parameters}


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    status = Path("/proc/self/status").read_text("utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def save(engine: Engine, folder: Path, world: process_group.DistContext) -> None:
    """Writes a checkpoint of an engine that has made no step, with the moments of one that has."""
    kinds = dict.fromkeys(engine.shapes, (MASTER, "exp_avg", "exp_avg_sq"))
    first = {(s.name, s.start): s.view_of(s.holder) for s in engine.param_shards}
    engine.load(
        lambda shard, kind: first[shard.name, shard.start] if kind == MASTER else torch.zeros(()), kinds, updates=1
    )
    writer = CheckpointWriter(folder, 1, 0, world)
    writer.save(engine, TrainState(step=1, updates=1), None, {"corpus": "", "pending": None}, lambda: None)
    writer.wait_for_save()
    writer.close()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model, world and stage: a fresh start, and where it is asked for a resumed one."""
    options.checkpoints = tempfile.mkdtemp(dir=options.folder)
    try:
        rows = []
        for kind in ("fresh", *(["resumed"] if options.save else [])):
            options.resumed, saved = kind == "resumed", options.save
            options.save = saved and not options.resumed
            rows.append({"start": kind} | world_of(options.size, start, options))
            options.save = saved
        return rows
    finally:
        shutil.rmtree(options.checkpoints, ignore_errors=True)


def allowed_bytes(parameters: int, workers: int) -> float:
    """The most that a rank may take at stage 3."""
    return SHARE * BYTES_PER_PARAMETER * parameters / workers + BASE


def main(arguments: list[str]) -> int:
    """Measures, prints the table, and returns 0 when the goal is met at stage 3, ``goals.MISSED`` when it is not."""
    parser = argparse.ArgumentParser(prog="bench start_memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=["gpt2_124m"])
    parser.add_argument("--workers", type=numbers, default=[1, 2])
    parser.add_argument("--stages", type=numbers, default=[0, 1, 2, 3])
    parser.add_argument("--only", choices=["fresh"], help="do not resume: a checkpoint takes 12 bytes a parameter")
    parser.add_argument("--folder", help="where to save; default: the place of temporary files")
    parser.add_argument("--out", type=Path, help="a file for the rows")
    options = parser.parse_args(arguments)
    options.save = options.only is None
    out, rows = Console(width=110), []
    for model, size, stage in itertools.product(options.models, options.workers, options.stages):
        options.model, options.size, options.stage = model, size, stage
        rows += [{"model": model, "workers": size, "stage": stage} | row for row in measure(options)]
    table = Table(title=f"starts in bf16 with AdamW, {results.processor()}: the slowest and the largest rank")
    for column in ("model", "workers", "stage", "start", "seconds", "peak GB", "of it libraries", "allowed GB"):
        table.add_column(column, justify="left" if column in ("model", "start") else "right")
    for row in rows:
        cells = [str(row[key]) for key in ("model", "workers", "stage", "start")]
        cells += [f"{row['seconds']:.1f}", *(f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "libraries_bytes"))]
        allowed = allowed_bytes(row["parameters"], row["workers"]) if row["stage"] == 3 else None
        table.add_row(*cells, "" if allowed is None else f"{allowed / 1e9:.2f}")
    out.print(table)
    if options.out:
        about = {"bench": "start_memory"} | results.machine(torch.device("cpu"))
        results.append(options.out, [about | row for row in rows])
    sharded = [row for row in rows if row["stage"] == 3]
    met = all(row["peak_bytes"] <= allowed_bytes(row["parameters"], row["workers"]) for row in sharded)
    return 0 if met else goals.MISSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
