"""Communication of ZeRO's stages by the number of ranks: a model, and its bytes checked against those really sent.

    ./launch.sh bench collectives [check=false] [rows=4096] [seq_len=2048] [micro=8] [ranks=8,64,...] [out=FILE]

Prints the part of a step in which the GPUs compute, from 8 to 4,096 ranks, at a global batch of so many rows. Seconds
are an estimate from data sheets (``train.planning.collectives`` has each number). ``check=true`` runs a tiny model on
2 and 4 real ranks over gloo at each stage, with the kernel's own count of the bytes that each socket sent.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.tools import goals, results
from bench.tools.options import Option, parse_options
from train.config import load as configuration
from train.data.prepare import prepare
from train.errors import ExitCode
from train.planning import collectives as costs

RANKS = (8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = {1: "ZeRO 1", 2: "ZeRO 2", 3: "ZeRO 3", 4: "3 with hpz"}
STEPS, ROWS = 6, 8
TINY = [
    "optimizer=adamw",
    *(
        "model=gpt_tiny",
        "model.width=512",
        "model.heads=8",
        "data=text",
        "data.paths=[README.md]",
        "data.tokenizer.kind=bytes",
    ),
    *("data.tokenizer.vocab_size=null", "precision=fp32", "batch.seq_len=32", f"batch.global={ROWS}", f"steps={STEPS}"),
    *("eval_every=0", "save_every=0", "log_every=1000", "tracking=off", "generation.prompts=[]"),
]
"""Matrices are larger than the 100,000 elements up to which stage 3 keeps a parameter whole on every rank."""
TOLERANCE = 0.03
"""Of the bytes: what the ranks say to each other outside DeepSpeed, and the frames of TCP messages."""
OPTIONS = {
    "check": Option(False),
    **{name: Option(usual, least=1) for name, usual in (("rows", 4096), ("seq_len", 2048), ("micro", 8))},
    "ranks": Option(RANKS, least=1),
    "out": Option(""),
}


def show_model(options: dict[str, Any], ranks: Sequence[int], out: Console) -> None:
    """Prints a table for each model and fabric."""
    tokens = options["rows"] * options["seq_len"]
    for model in (costs.LLAMA_7B, costs.LLAMA_70B):
        for name, fabric in costs.FABRICS.items():
            table = Table(title=f"{model.name}, {name}: part of a step that is computation, {tokens:,} tokens a step")
            table.add_column("ranks", justify="right")
            table.add_column("rows a micro-batch", justify="right")
            for stage in STAGES.values():
                table.add_column(stage, justify="right")
            for size in ranks:
                rows = options["rows"] / size
                micro = min(options["micro"], rows)
                micro_tokens = micro * options["seq_len"]
                cells = ["less than a row"] * len(STAGES)
                if rows >= 1:
                    cells = [_cell(model, stage, size, (tokens / size, micro_tokens), fabric) for stage in STAGES]
                table.add_row(f"{size:,}", f"{micro:g}", *cells)
            out.print(table)


def _cell(model: costs.Model, stage: int, ranks: int, tokens: tuple[float, float], fabric: costs.Fabric) -> str:
    """``tokens``: of a rank in a step, and in a micro-batch."""
    if not costs.fits(model, min(stage, 3), ranks, fabric, stage == 4):
        return "no room"
    return f"{100 * costs.step(model, stage, ranks, tokens, fabric).efficiency:.0f} %"


def count(stage: int, ranks: int, micro: int, folder: Path) -> tuple[float, float]:
    """(bytes that a rank sent in a step, median of steps and ranks; bytes by the model) of a real run over gloo."""
    overrides = [*TINY, f"zero.stage={stage}", f"batch.micro={micro}", f"run.dir={folder}/run_{stage}_{ranks}_{micro}"]
    config = configuration.load([*overrides, f"cluster.workers={ranks}"])
    corpus = prepare.find_prepared(config.data) or prepare.prepare(config.data, lambda progress: None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes, outs = [], [folder / f"sent_{stage}_{ranks}_{micro}_{rank}.json" for rank in range(ranks)]
    for rank, file in enumerate(outs):
        command = [sys.executable, "-m", "bench.tools.counted_rank", str(file), str(corpus), *overrides]
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors.decode(errors="replace")[-2000:])
    steps = []
    for file in outs:
        sent = json.loads(file.read_text("utf-8"))
        steps += [after - before for before, after in itertools.pairwise(sent[2:])]
    params = json.loads(outs[0].with_suffix(".params").read_text("utf-8"))
    model = costs.Model("counted", params, 1, weight_bytes=4, gradient_bytes=4)
    moved = costs.transfers(model, stage, ROWS // (ranks * micro))
    return statistics.median(steps), sum(costs.bytes_sent(transfer, ranks, gloo=True) for transfer in moved)


def check(out: Console) -> list[dict[str, Any]]:
    """Counts at each stage, on 2 and 4 ranks, with 1 and 2 micro-batches a step; prints counted beside modelled."""
    rows: list[dict[str, Any]] = []
    table = Table(title="bytes that a rank sends in a step over gloo, as the kernel counts them, and by the model")
    for column in ("stage", "ranks", "micro-batches", "counted", "model", "counted / model"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as temporary:
        for stage in (0, 1, 2, 3):
            for ranks in (2, 4):
                for micro_batches in (1, 2):
                    sent, modelled = count(stage, ranks, ROWS // ranks // micro_batches, Path(temporary))
                    rows.append({"stage": stage, "ranks": ranks, "micro_batches": micro_batches})
                    rows[-1] |= {"counted": sent, "modelled": modelled}
                    numbers = [str(stage), str(ranks), str(micro_batches), f"{sent:,.0f}", f"{modelled:,.0f}"]
                    table.add_row(*numbers, f"{sent / modelled:.3f}")
    out.print(table)
    return rows


def main(arguments: list[str]) -> int:
    """Prints the model, and with ``check=true`` its check; 0 when all counts are within ``TOLERANCE``."""
    options, _ = parse_options(arguments, OPTIONS)
    out = Console(width=None if sys.stdout.isatty() else 120)
    show_model(options, options["ranks"], out)
    if not options["check"]:
        return ExitCode.OK
    rows = check(out)
    if options["out"]:
        about = {"bench": "collectives"} | results.machine(torch.device("cpu"))
        results.append(Path(options["out"]), [about | row for row in rows])
    far = [row for row in rows if abs(row["counted"] / row["modelled"] - 1) > TOLERANCE]
    out.print(f"{len(rows) - len(far)} of {len(rows)} counts are within {100 * TOLERANCE:.0f} % of the model")
    return goals.MISSED if far else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
