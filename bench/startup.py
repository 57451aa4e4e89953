"""Time from the command to the end of the first step, by phase, beside torchrun running the same step and Ray Train.

    ./launch.sh bench startup [repeats=5] [group=choice] [key=value]

launch.sh and torchrun train the same resolved configuration on the same prepared corpus; Ray Train
(``bench.tools.ray_train``) the same model with plain DistributedDataParallel on random tokens, which is less; it needs
the extra ``bench``. They take turns, so that a slow minute of the machine is shared. Each run is ended after its first
step. Medians, in seconds since the command was given.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from bench import restart
from bench.tools import results
from bench.tools.options import Option, parse_options
from train.config import load as configuration
from train.config.schema import Config
from train.data.prepare import prepare

REPOSITORY = Path(__file__).resolve().parent.parent
LIMIT_S = 300.0
GOAL = 1.1
FIXED = ["tracking=off", "cluster.workers=2"]
PHASES = {
    "config": "configuration composed",
    "ray": "Ray up",
    "workers": "workers placed",
    "imports": "imports done",
    "data": "ranks met",
    "engine": "data open, engine begun",
    "first_step": "engine built",
    "train": "first step done",
}

Marks = dict[str, float]


def ours(overrides: list[str], run_dir: Path) -> Marks:
    """Phases of one start of ``launch.sh train``, in seconds since the command."""
    log = run_dir.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        command = [REPOSITORY / "launch.sh", "train", *overrides, f"run.dir={run_dir}"]
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        end = time.monotonic() + LIMIT_S
        while not (run_dir / "startup.json").exists():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"launch.sh reached no first step:\n{log.read_text('utf-8')}")
            time.sleep(0.05)
        return json.loads((run_dir / "startup.json").read_text("utf-8"))
    finally:
        process.kill()
        process.wait()


def torchrun(config: Path, corpus: str, workers: int) -> Marks:
    """Phases of one start of torchrun with the same step, from the events that rank 0 prints as JSON lines."""
    began = time.time()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    worker = ["-m", "train", "worker", f"config={config}", f"corpus={corpus}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"}
    process = subprocess.Popen(
        [*launcher, *worker], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    marks: Marks = {}
    try:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line) if line.startswith(b"{") else {}
            if event.get("event") == "phase":
                marks.setdefault(event["name"], event["t"] - began)
            if "train" in marks:
                return marks
        raise SystemExit(f"torchrun reached no first step: try it by hand:\n{' '.join([*launcher, *worker])}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ray_train(overrides: list[str], workers: int, folder: Path) -> Marks:
    """Time of the first step of one start of Ray Train, in seconds since the command."""
    folder.mkdir()
    began = time.time()
    with restart.Job([sys.executable, "-m", "bench.tools.ray_train", str(folder), *overrides], folder / "log") as job:
        job.until(lambda: len(restart.fresh(folder, began)) == workers)
        return {"train": max(record["first"] for record in restart.fresh(folder, began)) - began}


def same_run(config: Config, folder: Path) -> Path:
    """The resolved configuration as a file, for a run in ``folder``."""
    values = configuration.to_dict(config)
    values["run"]["dir"] = str(folder)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def main(arguments: list[str]) -> int:
    """Measures, prints the table, and returns 0 when the goal is met."""
    options, overrides = parse_options(arguments, {"repeats": Option(5, least=1)}, FIXED)
    repeats = options["repeats"]
    config = configuration.load(overrides)
    corpus = prepare.find_prepared(config.data) or prepare.prepare(config.data, lambda progress: None)
    mine, theirs, peers = [], [], []
    out, peer = Console(), restart.has_ray_train()
    if not peer:
        out.print(restart.LEFT_OUT)
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(repeats):
            mine.append(ours(overrides, Path(temporary) / f"ours_{number}"))
            settings = same_run(config, Path(temporary) / f"torchrun_{number}")
            theirs.append(torchrun(settings, str(corpus.absolute()), config.cluster.worker_count))
            if peer:
                peers.append(ray_train(overrides, config.cluster.worker_count, Path(temporary) / f"ray_train_{number}"))
    table = Table(title=f"seconds since the command, median of {repeats}, {config.cluster.worker_count} workers")
    for column in ("phase", "launch.sh", "torchrun", *(["Ray Train"] if peer else [])):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for key, words in PHASES.items():
        table.add_row(words, *(middle_of(runs, key) for runs in (mine, theirs, peers) if runs))
    own_time = statistics.median(marks["train"] for marks in mine)
    ratio = own_time / statistics.median(marks["train"] for marks in theirs)
    out.print(table)
    out.print(f"launch.sh / torchrun: {ratio:.2f} (goal: at most {GOAL})")
    return int(ratio > GOAL)


def middle_of(runs: list[Marks], key: str) -> str:
    """The median of a phase as text; empty where no run has it."""
    seconds = [run[key] for run in runs if key in run]
    return results.middle(seconds, 2)[0] if seconds else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
