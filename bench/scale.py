"""Control plane of a job by its number of ranks: seconds to notice and to name each fault, and what the driver costs.

    ./launch.sh bench scale [ranks=8,64,256,1024] [faults=10] [work_s=1.0] [seed=0] [out=FILE] [key=value]

Driver, supervisor, agents, fork server and their messages are the product's own; hosts and ranks are simulated
(``bench.tools.simulated_hosts``), 8 ranks a host. Each job meets ``faults`` faults: a rank is killed, hangs, or is
stopped, a host is lost, a tenth of the ranks become slow, and the driver is killed. It is a fault's right name where
the report says which rank or host it was and what happened to it. CPU is counted by the kernel and holds on a busy
machine too; seconds of the wall need a quiet one. Returns ``goals.MISSED`` where a name is wrong or a goal is missed.
"""

from __future__ import annotations

import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.restart import GoneError
from bench.tools import goals
from bench.tools.options import Option, parse_options
from bench.tools.simulated_hosts import host_name, single_hosts
from bench.tools.simulated_ranks import HANG, SLOW
from train.util.run_layout import RunDir

RANKS = (8, 64, 256, 1024)
WORKERS_A_HOST = 8
HANG_S = 10
"""The job's ``cluster.hang_timeout``: of a hang this much passes before it is one."""
SLOW_PART = 0.1
STEADY_S = 20.0
"""Of undisturbed steps, over which the CPU is counted."""
LIMIT_S = 600.0
FAULTS = ("kill", "hang", "kill", "host", "stop", "slow", "kill", "hang", "host", "driver")
"""The faults of a job, in turn."""
OPTIONS = {
    "ranks": Option(RANKS, least=1),
    "faults": Option(len(FAULTS), least=0),
    "work_s": Option(1.0, least=0),
    "seed": Option(0),
    "out": Option(""),
}
FIXED = [
    "model=gpt_tiny",
    "batch.micro=1",
    "steps=1000000000",
    "save_every=0",
    "eval_every=0",
    "tracking=off",
    f"cluster.hang_timeout={HANG_S}",
    "cluster.max_failures=1000000",
]


@dataclass(frozen=True)
class Answer:
    """A job's answer to one fault."""

    fault: str
    noticed_s: float
    """From the fault to its report; of a hang, beyond ``cluster.hang_timeout``."""
    named: bool
    report: str
    restarted_s: float
    """From the report until all ranks have met again; 0 where none had to start again."""


class SimulatedJob:
    """A driver over simulated hosts, with the events that it shows and the processes that it has."""

    def __init__(self, folder: Path, ranks: int, work_s: float, overrides: Sequence[str]) -> None:
        self.folder, self.ranks = folder, ranks
        self.workers = min(WORKERS_A_HOST, max(1, ranks // 4))
        self.hosts = -(-ranks // self.workers)
        settings = [*FIXED, f"run.dir={folder}/run", f"batch.global={ranks}", f"cluster.workers={ranks}", *overrides]
        module = "bench.tools.simulated_hosts"
        self.command = [sys.executable, "-m", module, str(self.workers), str(work_s), *settings]
        self.events: collections.deque[dict[str, Any]] = collections.deque()
        self.offset = 0
        self.began = time.time()
        self.start()

    def start(self) -> None:
        """Gives the command."""
        self.began = time.time()
        with (self.folder / "out").open("a", encoding="utf-8") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=out, start_new_session=True)

    def end(self) -> None:
        """Kills the driver, with which all its processes end."""
        self.process.kill()
        self.process.wait()

    def wait_for(self, what: str, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next event after those seen so far for which ``found`` holds."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            while self.events:
                event = self.events.popleft()
                if found(event):
                    return event
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "out").read_text("utf-8")[-3000:]
                raise GoneError(f"{self.ranks} ranks: waited in vain for {what}:\n{tail}")
            time.sleep(0.05)
            self._read_events()

    def _read_events(self) -> None:
        file = self.folder / "run" / "events.jsonl"
        if not file.exists():
            return
        with file.open("rb") as source:
            source.seek(self.offset)
            whole, _, _ = source.read().rpartition(b"\n")
        self.offset += len(whole) + 1 if whole else 0
        self.events.extend(json.loads(line) for line in whole.splitlines())

    def wait_until_met(self) -> float:
        """When all ranks of the newest start have met, in seconds since 1970."""
        return float(self.wait_for("all ranks to meet", _is_phase("connected"))["t"])

    def wait_until_training(self) -> float:
        """When all ranks of the newest start have made a step, in seconds since 1970."""
        return float(
            self.wait_for("all ranks to train", lambda event: event["event"] in ("world", "recovered"))["shown"]
        )

    def locations(self) -> list[dict[str, Any]]:
        """Where each rank is."""
        where: list[dict[str, Any]] = json.loads(RunDir(self.folder / "run").world.read_text("utf-8"))["ranks"]
        return where

    def descendants(self) -> list[psutil.Process]:
        """All processes of the driver's, by name of module where they are ours."""
        return psutil.Process(self.process.pid).children(recursive=True)


def _is_phase(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == "phase" and event["name"] == name and event.get("rank") == 0


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds that these processes have had so far."""
    total = 0.0
    for process in processes:
        with_children = process.cpu_times()
        total += with_children.user + with_children.system
    return total


def measure_steady(job: SimulatedJob) -> dict[str, float]:
    """The cost of a job of which nothing happens: CPU, sockets and memory of its driver, and CPU of the agents."""
    driver = psutil.Process(job.process.pid)
    others = job.descendants()
    agents = [process for process in others if "HostProcess" in " ".join(process.cmdline())]
    ray = [process for process in others if process.name() in ("raylet", "gcs_server")]
    before = [cpu_s([driver]), cpu_s(agents), cpu_s(ray)]
    began = time.monotonic()
    time.sleep(STEADY_S)
    seconds = time.monotonic() - began
    used = [now - then for now, then in zip([cpu_s([driver]), cpu_s(agents), cpu_s(ray)], before, strict=True)]
    files = [str(link.readlink()) for link in Path(f"/proc/{driver.pid}/fd").iterdir() if link.is_symlink()]
    return {
        "driver_cores": used[0] / seconds,
        "agents_cores_a_host": used[1] / seconds / job.hosts,
        "ray_cores": used[2] / seconds,
        "driver_sockets": sum(file.startswith("socket:") for file in files),
        "driver_files": len(files),
        "driver_mib": driver.memory_info().rss / 2**20,
        "agents_mib_a_host": sum(process.memory_info().rss for process in agents) / 2**20 / job.hosts,
    }


def inject(job: SimulatedJob, fault: str, draw: random.Random) -> Answer:
    """Has one fault happen, waits for the report and for the job to train again."""
    if fault == "slow":
        return inject_slow(job, draw)
    if fault == "driver":
        return inject_driver(job)
    victim = draw.choice(job.locations())
    if fault == "host":
        name = host_name(draw.choice(sorted(single_hosts(job.hosts))))
        victim = next(where for where in job.locations() if where["host"] == name)
    number = {"kill": signal.SIGKILL, "host": signal.SIGKILL, "hang": HANG, "stop": signal.SIGSTOP}[fault]
    moment = time.time()
    os.kill(victim["steward"] if fault == "host" else victim["pid"], number)
    event = job.wait_for(f"the report of {fault}", lambda event: event["event"] == "failure")
    first = event["lines"][0]
    words = {"kill": "killed by SIGKILL", "host": "lost with its host", "hang": "hung", "stop": "hung"}[fault]
    place = f" on {victim['host']} " if fault == "host" else f"rank {victim['rank']} on {victim['host']} "
    named = place in first and words in first
    named &= fault != "stop" or "stopped by a signal" in " ".join(event["lines"])
    met = job.wait_until_met()
    job.wait_until_training()
    waited = float(HANG_S) if fault in ("hang", "stop") else 0.0
    return Answer(fault, event["shown"] - moment - waited, named, first, met - event["shown"])


def inject_slow(job: SimulatedJob, draw: random.Random) -> Answer:
    """Has a tenth of the ranks work more slowly until they are reported."""
    where = job.locations()
    slow = {each["rank"] for each in draw.sample(where, max(1, round(SLOW_PART * len(where))))}
    pids = [each["pid"] for each in where if each["rank"] in slow]
    moment = time.time()
    for pid in pids:
        os.kill(pid, SLOW)
    said: set[int] = set()
    texts: list[str] = []

    def reported(event: dict[str, Any]) -> bool:
        if event["event"] == "note" and "slow" in event["text"]:
            texts.append(event["text"])
            said.update(ranks_in(event["text"]))
        return said >= slow

    event = job.wait_for("the slow ranks to be named", reported)
    for pid in pids:
        os.kill(pid, SLOW)
    return Answer("slow", event["shown"] - moment, said == slow, texts[-1][:200], 0.0)


def ranks_in(text: str) -> set[int]:
    """The ranks that a note names: "rank 3 on a is slow", "ranks 3-5, 9 (2 hosts) are slow"."""
    found = re.match(r"ranks? ([\d, -]+)", text)
    ranks: set[int] = set()
    for part in found[1].split(",") if found else ():
        first, _, last = part.strip().partition("-")
        ranks |= {*range(int(first), int(last or first) + 1)} if first else set()
    return ranks


def inject_driver(job: SimulatedJob) -> Answer:
    """Kills the driver, waits for all its ranks to be gone, and gives the command again."""
    pids = [each["pid"] for each in job.locations()]
    moment = time.time()
    job.end()
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.time() > moment + LIMIT_S:
            raise GoneError(f"{job.ranks} ranks: workers outlive their driver")
        time.sleep(0.05)
    gone = time.time()
    job.start()
    met = job.wait_until_met()
    job.wait_until_training()
    return Answer("driver", gone - moment, True, "its ranks ended with it", met - job.began)


def measure(ranks: int, faults: Sequence[str], work_s: float, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Runs one job: its start, what it costs undisturbed, and its answers to the faults."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        job = SimulatedJob(Path(temporary), ranks, work_s, overrides)
        try:
            met_s = job.wait_until_met() - job.began
            start_cpu_s = cpu_s([psutil.Process(job.process.pid)])
            job.wait_until_training()
            start = json.loads(RunDir(job.folder / "run").startup.read_text("utf-8"))
            steady = measure_steady(job)
            answers = []
            for fault in faults:
                driver = psutil.Process(job.process.pid)
                before = cpu_s([driver])
                try:
                    answers.append(asdict(inject(job, fault, draw)))
                except GoneError as error:  # the faults before it count none the less
                    answers.append(asdict(Answer(fault, 0.0, False, str(error), 0.0)))
                    break
                if job.process.pid == driver.pid:
                    answers[-1]["driver_cpu_s"] = cpu_s([driver]) - before
        finally:
            job.end()
    about = {"ranks": ranks, "hosts": job.hosts, "met_s": met_s, "start_cpu_s": start_cpu_s, "start": start}
    return {**about, **steady, "answers": answers}


def show(rows: Sequence[dict[str, Any]], out: Console) -> None:
    """Prints a table of the sizes and one of the faults."""
    table = Table(title="control plane by ranks, undisturbed")
    for column in (
        "ranks",
        "hosts",
        "start s",
        "start CPU s",
        "driver cores",
        "sockets",
        "files",
        "MiB",
        "agents cores/host",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        start, used = f"{row['met_s']:.1f}", f"{row['start_cpu_s']:.2f}"
        cores, agents = f"{row['driver_cores']:.3f}", f"{row['agents_cores_a_host']:.3f}"
        counts = [f"{row[key]:.0f}" for key in ("driver_sockets", "driver_files", "driver_mib")]
        table.add_row(str(row["ranks"]), str(row["hosts"]), start, used, cores, *counts, agents)
    out.print(table)
    table = Table(title="faults: worst of each kind")
    for column in ("ranks", "fault", "times", "noticed s", "named right", "met again s", "driver CPU s"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for row in rows:
        for fault in dict.fromkeys(answer["fault"] for answer in row["answers"]):
            same = [answer for answer in row["answers"] if answer["fault"] == fault]
            noticed = max(answer["noticed_s"] for answer in same)
            again = max(answer["restarted_s"] for answer in same)
            cpu = max(answer.get("driver_cpu_s", 0.0) for answer in same)
            named = f"{sum(answer['named'] for answer in same)} of {len(same)}"
            cells = [f"{noticed:.2f}", named, f"{again:.2f}", f"{cpu:.2f}"]
            table.add_row(str(row["ranks"]), fault, str(len(same)), *cells)
    out.print(table)


def missed(row: dict[str, Any]) -> list[str]:
    """The goals that a job has missed, in words."""
    answers = row["answers"]
    problems = [f"{a['fault']} was reported as: {a['report']}" for a in answers if not a["named"]]
    if row["driver_cores"] > goals.SCALE_DRIVER_CORES:
        problems.append(f"the driver took {row['driver_cores']:.2f} cores (goal: {goals.SCALE_DRIVER_CORES})")
    for answer in answers:
        if answer["fault"] not in ("slow", "driver") and answer["noticed_s"] > goals.SCALE_NOTICED_S:
            problems.append(f"{answer['fault']}: noticed after {answer['noticed_s']:.1f} s")
        if answer["fault"] != "driver" and answer["restarted_s"] > goals.SCALE_RESTARTED_S:
            problems.append(f"{answer['fault']}: met again after {answer['restarted_s']:.1f} s")
    return [f"{row['ranks']} ranks: {problem}" for problem in problems]


def main(arguments: list[str]) -> int:
    """Measures each size, prints the tables, appends the rows. Returns 0 when all goals are met."""
    options, overrides = parse_options(arguments, OPTIONS, FIXED)
    overrides = overrides[len(FIXED) :]
    out = Console()
    faults = [FAULTS[n % len(FAULTS)] for n in range(options["faults"])]
    rows = []
    about: dict[str, Any] = {"bench": "scale"}
    if options["out"]:
        import torch  # only now: it takes seconds of the CPU that the jobs share

        from bench.tools import results

        about |= results.machine(torch.device("cpu"))
    for ranks in options["ranks"]:
        out.print(f"{ranks} ranks: start, {STEADY_S:.0f} s undisturbed, {len(faults)} faults ...")
        rows.append(measure(ranks, faults, options["work_s"], options["seed"], overrides))
        if options["out"]:
            results.append(Path(options["out"]), [about | rows[-1]])
    show(rows, out)
    problems = [problem for row in rows for problem in missed(row)]
    for problem in problems:
        out.print(problem, markup=False)
    named = sum(answer["named"] for row in rows for answer in row["answers"])
    out.print(f"{named} of {sum(len(row['answers']) for row in rows)} faults named right")
    return goals.MISSED if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
