"""Goodput of a job of which a random process is killed every few seconds, beside Ray Train's with the same checkpoints.

    ./launch.sh bench faults [minutes=10] [every=15] [victims=all] [peer=true] [seed=0] [out=FILE] [key=value]

A job trains gpt_tiny on two workers and saves every 20 steps. First nobody disturbs it for a while, which gives its own
speed; then for ``minutes`` one of its processes, drawn at random, gets a SIGKILL every ``every`` seconds, whether the
job has recovered from the last one or not. Goodput is the steps that were kept, over those that the undisturbed job
makes in this time. ``victims=all`` draws from all that the command has started and from the command itself, Ray's own
processes too; ``victims=workers`` from the processes that train. Where the command ends, it is given again at once, on
both sides. Ray Train needs the extra ``bench``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench import restart
from bench.tools import goals, results
from bench.tools.options import Option, parse_options
from cluster.worker.fork_server import SPARE_NAME

GOODPUT, RATIO = 0.90, 3.0
WARM_UP_S, UNDISTURBED_S = 15.0, 60.0
CHECK_S = 0.05
OPTIONS = {
    "minutes": Option(10.0, least=0.1),
    "every": Option(15.0, least=0.1),
    "victims": Option("all", choices=("all", "workers")),
    "peer": Option(True),
    "seed": Option(0),
    "out": Option(""),
}
OURS = "launch.sh"


@dataclass
class DisturbedJob:
    """A command that is given again whenever it ends, and the processes that it has at any moment."""

    command: list[str]
    log: Path
    progress: Callable[[], int]
    """The step that it has come to."""
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    sessions: set[int] = field(default_factory=set)
    """Sessions that processes of it have begun; one whose parent was killed is no longer below the command."""

    def keep_alive(self) -> None:
        """Gives the command where it is not running."""
        if self.process is None or self.process.poll() is not None:
            with self.log.open("ab") as file:
                self.process = subprocess.Popen(self.command, stdout=file, stderr=file, start_new_session=True)
            self.starts += 1

    def processes(self) -> list[psutil.Process]:
        """The command's own process, all below it, and those of their sessions."""
        assert self.process is not None
        found: set[psutil.Process] = set()
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            found.update([root, *root.children(recursive=True)])
        for process in found:
            with contextlib.suppress(OSError):
                self.sessions.add(os.getsid(process.pid))
        for pid in set(psutil.pids()) - {process.pid for process in found}:
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) in self.sessions:
                    found.add(psutil.Process(pid))
        return sorted(found, key=lambda process: process.pid)

    def end(self) -> None:
        """Kills all of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process is not None:
            self.process.wait()


@dataclass
class Ordeal:
    """The course of a job that was disturbed."""

    goodput: float = 0.0
    rate: float = 0.0
    """Steps a second while nobody disturbed it."""
    steps: int = 0
    """Those kept while it was disturbed."""
    seconds: float = 0.0
    commands: int = 0
    """How often the command was given."""
    stalls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By kind of victim: the longest pause in the steps after each kill, in seconds, until the next one."""


def kind(process: psutil.Process, job: DisturbedJob) -> str:
    """The name of a process by its part in a job: worker, fork server, raylet, ..."""
    assert job.process is not None
    words, parent = process.cmdline(), process.parent()
    title = " ".join(words)
    if process.pid == job.process.pid:
        return "the command"
    if process.name() == SPARE_NAME:
        return "spare fork server"
    if "RayTrainWorker" in title or (parent and "fork_server" in title and parent.cmdline() == words):
        return "worker"
    if title.startswith("ray::"):
        return title.partition(":")[2].strip(":").partition(".")[0].split(" ")[0]
    return "fork server" if "fork_server" in title else Path(_script(words)).stem


def _script(words: list[str]) -> str:
    """The program of a command line: of an interpreter's the script or module."""
    if not Path(words[0]).name.startswith("python"):
        return words[0]
    named = [word for word in words[1:] if not word.startswith("-")]
    return named[0] if named else words[0]


def disturb(job: DisturbedJob, minutes: float, every: float, victims: str, draw: random.Random) -> Ordeal:
    """Runs ``job``, kills processes of it, and measures. Raises GoneError where it makes no step before any kill."""
    course = Ordeal()
    job.keep_alive()
    try:
        _wait_for_steps(job)
        time.sleep(WARM_UP_S)
        first, began = job.progress(), time.monotonic()
        time.sleep(UNDISTURBED_S)
        before, start = job.progress(), time.monotonic()
        course.rate = (before - first) / (start - began)
        _kill_in_turns(job, course, start + 60 * minutes, every, victims, draw)
        course.steps, course.seconds = job.progress() - before, time.monotonic() - start
    finally:
        job.end()
    course.goodput, course.commands = course.steps / course.seconds / course.rate, job.starts
    return course


def _wait_for_steps(job: DisturbedJob) -> None:
    end = time.monotonic() + restart.LIMIT_S
    while not job.progress():
        assert job.process is not None
        if job.process.poll() is not None or time.monotonic() > end:
            raise restart.GoneError(f"no step was made:\n{job.log.read_text('utf-8')[-4000:]}")
        time.sleep(CHECK_S)


def _kill_in_turns(
    job: DisturbedJob, course: Ordeal, end: float, every: float, victims: str, draw: random.Random
) -> None:
    turn, step, moved, named = time.monotonic(), 0, time.monotonic(), ""
    while (now := time.monotonic()) < end:
        job.keep_alive()
        if (reached := job.progress()) != step:
            step, moved = reached, now
        if named:
            course.stalls[named][-1] = max(course.stalls[named][-1], now - moved)
        if now >= turn and (victim := _kill_one(job, victims, draw)):
            turn, named = turn + every, victim
            course.stalls[named].append(0.0)
        time.sleep(CHECK_S)


def _kill_one(job: DisturbedJob, victims: str, draw: random.Random) -> str:
    """Kills a random process; its kind, or "" where there is none to kill now."""
    with contextlib.suppress(psutil.Error, IndexError):
        kinds = {process: kind(process, job) for process in job.processes() if process.status() != "zombie"}
        victim, name = draw.choice([pair for pair in kinds.items() if victims == "all" or pair[1] == "worker"])
        victim.send_signal(signal.SIGKILL)
        return name
    return ""


def last_step(file: Path) -> int:
    """The step of the last whole line of a file of JSON lines; 0 where there is none."""
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        lines.seek(max(0, os.fstat(lines.fileno()).st_size - 4096))
        whole = lines.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    with contextlib.suppress(ValueError):
        return int(json.loads(whole)["step"])
    return 0


def jobs(overrides: list[str], folder: Path, peer: bool) -> dict[str, DisturbedJob]:
    """Ours, and Ray Train's where its packages are there, by name."""
    run, steps = folder / "run", folder / "peer"
    steps.mkdir()
    command = [str(results.REPOSITORY / "launch.sh"), "train", *overrides, f"run.dir={run}"]
    made = {OURS: DisturbedJob(command, folder / "ours.log", lambda: last_step(run / "metrics.jsonl"))}
    if peer:
        command = [sys.executable, "-m", "bench.tools.ray_train", str(steps), *overrides]
        made["Ray Train"] = DisturbedJob(command, folder / "peer.log", lambda: last_step(steps / "steps.jsonl"))
    return made


def table(courses: dict[str, Ordeal]) -> Table:
    """The pauses by kind of victim."""
    made = Table(title="longest pause in the steps after a SIGKILL: kills, median, worst seconds")
    made.add_column("victim")
    for name in courses:
        made.add_column(name, justify="right")
    for victim in sorted({victim for course in courses.values() for victim in course.stalls}):
        seconds = [course.stalls.get(victim, []) for course in courses.values()]
        made.add_row(victim, *(f"{len(s)}  {statistics.median(s):.2f}  {max(s):.2f}" if s else "" for s in seconds))
    return made


def main(arguments: list[str]) -> int:
    """Measures, prints the tables. Returns 0 when the goals are met, ``goals.MISSED`` when they are not."""
    options, overrides = parse_options(arguments, OPTIONS, [*restart.FIXED, "tracking=off"])
    out, peer, courses = Console(soft_wrap=True, highlight=False), options["peer"], {}
    if peer and not restart.has_ray_train():
        out.print(restart.LEFT_OUT)
        peer = False
    with tempfile.TemporaryDirectory() as temporary:
        for name, job in jobs(overrides, Path(temporary), peer).items():
            draw = random.Random(options["seed"])
            try:
                course = courses[name] = disturb(job, options["minutes"], options["every"], options["victims"], draw)
            except restart.GoneError as error:
                if name == OURS:
                    raise SystemExit(str(error)) from None
                out.print(f"{name}: {error}")  # what ours came to is told all the same
                continue
            kills = sum(map(len, course.stalls.values()))
            out.print(
                f"{name}: goodput {course.goodput:.3f}: {course.steps} steps kept in {course.seconds:.0f} s with "
                f"{kills} kills, at {course.rate:.1f} steps a second undisturbed; "
                f"the command was given {course.commands} times"
            )
    out.print(table(courses))
    if options["out"]:
        about = results.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        row = {"overrides": overrides, "options": options, **{name: vars(course) for name, course in courses.items()}}
        results.append(Path(options["out"]), [{"bench": "faults"} | about | row])
    goodput, ratio = courses[OURS].goodput, None
    out.print(f"goodput {goodput:.3f} (goal: at least {GOODPUT})")
    if "Ray Train" in courses:
        ratio = goodput / max(courses["Ray Train"].goodput, 1e-9)
        out.print(f"launch.sh / Ray Train: {ratio:.1f} (goal: at least {RATIO:.0f})")
    beside = not peer or (ratio is not None and ratio >= RATIO)
    return 0 if goodput >= GOODPUT and beside else goals.MISSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
