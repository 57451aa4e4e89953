"""Seconds from the SIGKILL of one worker to the next step of all of them, by phase, beside Ray Train's own recovery.

    ./launch.sh bench restart [repeats=20] [peer=true] [out=FILE] [group=choice] [key=value]

One job trains gpt_tiny, and one of its workers, drawn at random, is killed again and again at random moments. Ray
Train (a TorchTrainer with a FailureConfig, gloo) trains the same objective on as many workers, with a checkpoint every
so many steps too, and has the same done to it; it needs the extra ``bench``. Medians, in seconds since the kill; a row
with all of them is appended to ``out``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.tools import goals, results
from bench.tools.options import Option, parse_options
from train.config import load as configuration
from train.reporting.failure_block import PHASES

REPOSITORY = Path(__file__).resolve().parent.parent
LIMIT_S = 120.0
PAUSE_S = (0.5, 1.5)
"""Range of the random pause between a recovery and the next kill, in seconds."""
FIXED = [
    "model=gpt_tiny",
    "precision=fp32",
    "batch.seq_len=64",
    "batch.global=8",
    "steps=10000000",
    "save_every=20",
    "eval_every=0",
    "log_every=10",
    "cluster.workers=2",
]

OPTIONS = {"repeats": Option(20, least=1), "peer": Option(True), "out": Option("")}
LEFT_OUT = Text("Ray Train is left out: it needs `pip install 'ray[train]'`, which is not in requirements.lock")
"""No markup: the brackets are meant."""
Marks = dict[str, float]


def has_ray_train() -> bool:
    """Whether the packages that Ray Train needs beside Ray are installed."""
    return importlib.util.find_spec("pandas") is not None


class GoneError(Exception):
    """Raised when a job ended, or did not recover in time."""


class Job:
    """A command in a session of its own, killed with all its processes when the block ends."""

    def __init__(self, command: list, log: Path) -> None:
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for ``condition`` for as long as the job is alive, at most LIMIT_S seconds."""
        end = time.monotonic() + LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise GoneError(f"the job did not come back:\n{self.log.read_text('utf-8')[-4000:]}")
            time.sleep(0.01)


def ours(overrides: list[str], folder: Path, repeats: int) -> list[Marks]:
    """The marks of ``repeats`` recoveries of one job, in seconds since each kill."""
    run_dir, recoveries = folder / "run", []
    record = run_dir / "restarts.jsonl"
    with Job([REPOSITORY / "launch.sh", "train", *overrides, f"run.dir={run_dir}"], folder / "ours.log") as job:
        job.until(lambda: bool(results.read(run_dir / "metrics.jsonl")))
        for number in range(repeats):
            time.sleep(random.uniform(*PAUSE_S))
            victim, killed = random.choice(trainers(job.process.pid)), time.time()
            os.kill(victim, signal.SIGKILL)
            job.until(lambda number=number: len(results.read(record)) > number)
            recoveries.append({key: results.read(record)[-1][key] - killed for key in ("failed", *PHASES)})
    return recoveries


def trainers(driver: int) -> list[int]:
    """The job's workers: what its fork server has forked."""
    children = psutil.Process(driver).children()
    servers = [child for child in children if "cluster.worker.fork_server" in child.cmdline()]
    forked = itertools.chain.from_iterable(server.children() for server in servers)
    return [process.pid for process in forked]


def ray_train(overrides: list[str], folder: Path, repeats: int) -> list[float]:
    """Seconds of each recovery of Ray Train, ``repeats`` of them or as many as succeeded."""
    steps, size, recoveries = folder / "peer", configuration.load(overrides).cluster.worker_count, []
    steps.mkdir()
    command = [sys.executable, "-m", "bench.tools.ray_train", str(steps), *overrides]
    with contextlib.suppress(GoneError), Job(command, folder / "peer.log") as job:
        for _ in range(repeats):
            job.until(lambda: len(fresh(steps, 0.0)) == size)
            time.sleep(random.uniform(*PAUSE_S))
            victim, killed = random.choice(fresh(steps, 0.0))["pid"], time.time()
            os.kill(victim, signal.SIGKILL)
            job.until(lambda killed=killed: len(fresh(steps, killed)) == size)
            recoveries.append(max(record["first"] for record in fresh(steps, killed)) - killed)
    return recoveries


def fresh(folder: Path, since: float) -> list[dict]:
    """Records of Ray Train's workers, a file each, whose first step of a start came after ``since``."""
    records = [json.loads(file.read_text("utf-8")) for file in folder.glob("rank_*.json")]
    return [record for record in records if record["first"] > since]


def main(arguments: list[str]) -> int:
    """Measures, prints the table, appends the row. Returns 0 when the goal is met, ``goals.MISSED`` when it is not."""
    options, overrides = parse_options(arguments, OPTIONS, [*FIXED, "tracking=off"])
    repeats = options["repeats"]
    random.seed(0)
    out, peer = Console(), options["peer"]
    if peer and not has_ray_train():
        out.print(LEFT_OUT)
        peer = False
    with tempfile.TemporaryDirectory() as temporary:
        mine = ours(overrides, Path(temporary), repeats)
        theirs = ray_train(overrides, Path(temporary), repeats) if peer else []
    table = Table(title=f"seconds since the SIGKILL of one worker, {repeats} times")
    for column in ("until", "median", "worst"):
        table.add_column(column, justify="left" if column == "until" else "right")
    for key, words in {"failed": "the end is noticed", **PHASES}.items():
        seconds = [marks[key] for marks in mine]
        table.add_row(words, f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}")
    if theirs:
        table.add_row("Ray Train: first step", f"{statistics.median(theirs):.2f}", f"{max(theirs):.2f}")
    median = statistics.median(marks["train"] for marks in mine)
    out.print(table)
    out.print(f"recovered {len(mine)} of {repeats} times; median {median:.2f} s (goal: at most {goals.RESTART_S} s)")
    if peer:
        ratio = f", {statistics.median(theirs) / median:.1f} times as long" if theirs else ""
        out.print(f"Ray Train: {len(theirs)} of {repeats} times within {LIMIT_S:.0f} s each{ratio}")
    if options["out"]:
        about = results.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        row = {"overrides": overrides, "recoveries": mine, "peer_s": theirs}
        results.append(Path(options["out"]), [{"bench": "restart"} | about | row])
    return 0 if median <= goals.RESTART_S else goals.MISSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
