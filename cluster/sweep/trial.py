"""One trial of a sweep: what is known of it, and the job that it is while it runs."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.raycluster.local_cluster import LocalRayCluster
from cluster.supervision import outcome, restart_policy
from cluster.supervision.job import Job
from cluster.supervision.slots import Slot
from cluster.supervision.supervisor import Supervisor
from train.config.schema import Config
from train.config.sweep_dir import pareto_front
from train.config.sweep_space import Params
from train.errors import UserError
from train.events import JobEndedEvent
from train.util.io import read_records
from train.util.run_layout import RunDir

Event = dict[str, Any]
SHORT = 8
"""Characters of a number that are shown as they are."""


@dataclass
class Trial:
    """What the driver knows of a trial."""

    number: int
    params: Params
    config: Config
    state: str = "queued"
    """queued, starting, running, saving, or one of ENDED."""
    step: int = 0
    seen: dict[str, float] = field(default_factory=dict)
    """The newest value of each metric."""
    values: list[float] | None = None
    """Of the metrics that the sweep is about, once it has ended."""
    why: str = ""
    """It failed."""
    tries: int = 0
    """Starts by this command that failed from outside."""
    pace: tuple[int, float] | None = None
    """The first step that was heard of, and when (monotonic)."""

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.dir or ".").absolute()

    @property
    def words(self) -> str:
        """How it is spoken of."""
        return f"trial {self.number} ({', '.join(f'{key}={short(value)}' for key, value in self.params.items())})"

    def hear(self, event: Event) -> None:
        """Takes what the job says into account."""
        if event["event"] == "step" and event.get("step"):
            self.step = event["step"]
            self.pace = self.pace or (self.step, time.monotonic())
        if event["event"] == "save":  # the last one is where it ends; steps are told from time to time
            self.step = max(self.step, event["step"])
        if event["event"] == "phase":
            self.state = {"train": "running", "save": "saving"}.get(event["name"], self.state)
        if event["event"] in ("step", "eval"):
            self.seen |= {key: value for key, value in event.items() if isinstance(value, float)}

    def seconds_left(self) -> float | None:
        """By its pace so far."""
        if self.pace is None or self.step <= self.pace[0]:
            return None
        return (time.monotonic() - self.pace[1]) / (self.step - self.pace[0]) * (self.config.steps - self.step)


def short(value: str) -> str:
    """A value as it is shown: of a long number, the digits that matter."""
    with contextlib.suppress(ValueError):
        return value if len(value) <= SHORT else f"{float(value):.4g}"
    return value


def history(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, as far as the run has come."""
    rows = read_records(RunDir(folder).metrics)
    return [(row["step"], float(row[metric])) for row in rows if isinstance(row.get(metric), int | float)]


def final(folder: Path, metrics: Sequence[str]) -> list[float] | None:
    """The metrics of a finished run: of its summary, or of the last step that has them. None where one was not measured."""
    summary: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(RunDir(folder).summary.read_text())
    found = []
    for metric in metrics:
        known = [value for _, value in history(folder, metric)[-1:]]
        value = summary.get(metric)
        found.append(float(value) if isinstance(value, int | float) else known[0] if known else None)
    return None if None in found else [value for value in found if value is not None]


class ClusterLost(Exception):  # noqa: N818  it is what the sweep is told
    """The sweep's own Ray cluster has ended under a trial."""


class Shared(LocalRayCluster):
    """The sweep's own cluster, as its trials see it: the sweep alone may start it anew, when they all have ended."""

    def __init__(self, private: LocalRayCluster) -> None:
        self.private, self.start = private, private.start

    def lost(self) -> bool:
        """Whether one of Ray's processes has ended."""
        return self.private.lost()

    def again(self) -> None:
        """Not here."""
        raise ClusterLost


class TrialJob:
    """A trial's job, followed in a thread of its own until all its processes have ended."""

    def __init__(self, job: Job, device: str, gang: Sequence[Slot], tell: Callable[[Event], None]) -> None:
        """``tell`` gets what the job says, and last a ``JobEndedEvent``."""
        self.job, self.tell = job, tell
        self.why = ""
        """The first line of the newest failure."""
        self.left: list[Slot] = []
        """Its places with their stewards, when it has ended and nothing was wrong with them."""
        self.supervisor = Supervisor(job, device, gang=gang)
        self.thread = threading.Thread(target=self._run, name=job.config.run.name, daemon=True)
        self.thread.start()

    def stop(self, number: int) -> None:
        """Has it save and end."""
        self.job.stop.request(number)

    def _run(self) -> None:
        verdict, why = outcome.Verdict("failed"), ""
        try:
            verdict = self.supervisor.run()
            if verdict.kind == "bad_input" and verdict.cause is not None:
                why = verdict.cause.error or ""
        except UserError as error:
            verdict, why = outcome.Verdict("bad_input"), str(error)
        except Exception:
            why = traceback.format_exc()
        lost = self.job.private is not None and self.job.private.lost()
        if not lost and verdict.kind in ("done", "stopped") and verdict.fault is None:
            self.left = self.supervisor.slots.hand_over_slots()
        self.tell(JobEndedEvent(verdict, why, lost).to_json())
        if not lost:  # Ray would not answer
            self.supervisor.release_slots()


def from_outside(verdict: outcome.Verdict) -> bool:
    """Whether a failure says nothing of the trial itself, so that another try may do better."""
    return verdict.kind == "failed" and verdict.fault in (*restart_policy.FROM_OUTSIDE, "hung")


def best(trials: Sequence[Trial], directions: Sequence[str]) -> list[Trial]:
    """The best of the finished trials; with several metrics, all that no other is better than in each."""
    signs = [1.0 if way == "minimize" else -1.0 for way in directions]
    points = {
        t.number: [s * v for s, v in zip(signs, t.values, strict=True)]
        for t in trials
        if t.state == "done" and t.values
    }
    if len(directions) == 1 and points:
        return [trials[min(points, key=lambda number: points[number])]]
    return [trials[number] for number in pareto_front(points)]
