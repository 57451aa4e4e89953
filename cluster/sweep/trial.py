"""One trial of a sweep: what is known of it, and its job while it runs."""

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

from cluster.supervision import outcome, restart_policy
from cluster.supervision.job import Job
from cluster.supervision.left_places import LeftPlace
from cluster.supervision.slots import Slot
from cluster.supervision.supervisor import Supervisor
from train.config.schema import Config
from train.config.sweep_dir import pareto_front
from train.config.sweep_space import Params
from train.errors import UserError
from train.events import JobEndedEvent
from train.util.format import finite
from train.util.io import read_records, steps_of
from train.util.reading import UNREADABLE, as_object
from train.util.run_layout import RunDir

Event = dict[str, Any]
SHORT = 8
"""Characters of a number that is shown in full."""


@dataclass
class Trial:
    """One run of a sweep as its driver knows it: its choices, how far it is, and how it ended."""

    number: int
    params: Params
    config: Config
    state: str = "queued"
    """queued, starting, running, saving, or one of ENDED."""
    step: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    """The newest value of each metric."""
    values: list[float] | None = None
    """The sweep's metrics, once the trial has ended."""
    why: str = ""
    """Why it failed."""
    tries: int = 0
    """Starts by this command that failed from outside."""
    first_heard: tuple[int, float] | None = None
    """The first step that was reported after its start, and when (monotonic); its pace is measured from there."""

    @property
    def folder(self) -> Path:
        """Absolute path of its run folder."""
        return Path(self.config.run.dir or ".").absolute()

    @property
    def title(self) -> str:
        """Its number and its choices, for messages."""
        return f"trial {self.number} ({', '.join(f'{key}={shorten(value)}' for key, value in self.params.items())})"

    def update(self, event: Event) -> None:
        """Takes over what an event of its job says about state, step and metrics."""
        if event["event"] == "step" and event.get("step"):
            self.step = event["step"]
            self.first_heard = self.first_heard or (self.step, time.monotonic())
        if event["event"] == "save":  # not every step is reported, but the last save is at the last step
            self.step = max(self.step, event["step"])
        if event["event"] == "phase":
            self.state = {"train": "running", "save": "saving"}.get(event["name"], self.state)
        if event["event"] in ("step", "eval"):
            self.latest |= {key: value for key, value in event.items() if isinstance(value, float)}

    def seconds_left(self) -> float | None:
        """Estimated seconds to its last step, by its pace so far; None before two steps were reported."""
        if self.first_heard is None or self.step <= self.first_heard[0]:
            return None
        step, moment = self.first_heard
        return (time.monotonic() - moment) / (self.step - step) * (self.config.steps - self.step)


def shorten(value: str) -> str:
    """A value for display: of a long number four significant digits, anything else as it is."""
    with contextlib.suppress(ValueError):
        return value if len(value) <= SHORT else f"{float(value):.4g}"
    return value


def metric_history(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in ``metrics.jsonl``, as far as the run in ``folder`` has come."""
    rows = steps_of(read_records(RunDir(folder).metrics))
    values = {step: _as_float(row.get(metric)) for step, row in rows.items()}
    return [(step, value) for step, value in values.items() if value is not None]


def _as_float(value: Any) -> float | None:
    """A number of a file, NaN included, as a float; None for what is none or is too large."""
    return float(value) if isinstance(value, float) or finite(value) else None


def final_metrics(folder: Path, metrics: Sequence[str]) -> list[float] | None:
    """The metrics of a finished run, of its summary or else of its last step with them; None where one is missing."""
    summary: dict[str, Any] = {}
    with contextlib.suppress(*UNREADABLE):
        summary = as_object(json.loads(RunDir(folder).summary.read_bytes()))
    values: list[float] = []
    for metric in metrics:
        value = summary.get(metric)
        if value is None:  # the newest measurement counts, also where it is null: the model has diverged
            rows = steps_of(read_records(RunDir(folder).metrics)).values()
            measured = [row[metric] for row in rows if metric in row]
            value = measured[-1] if measured else None
        number = _as_float(value)
        if number is None:
            return None
        values.append(number)
    return values


class TrialJob:
    """A trial's job, supervised in a thread of its own until all its processes have ended."""

    def __init__(
        self,
        job: Job,
        device: str,
        gang: Sequence[Slot],
        send_event: Callable[[Event], None],
        left: Sequence[LeftPlace] = (),
    ) -> None:
        """``send_event`` gets the job's events, and last {"event": "ended", "verdict", "why", "lost"}.

        ``left``: GPUs and hosts that trials before it have left.
        """
        self.job, self.send_event = job, send_event
        self.why = ""
        """First line of the newest failure."""
        self.reusable_slots: list[Slot] = []
        """Its slots with their agents, once the job has ended and nothing was wrong with them."""
        self.supervisor = Supervisor(job, device, gang=gang, left=left)
        self.thread = threading.Thread(target=self._run, name=job.config.run.name, daemon=True)
        self.thread.start()

    @property
    def left(self) -> list[LeftPlace]:
        """GPUs and hosts that the job does not use any more because of a fault of the device."""
        return self.supervisor.slots.left

    def request_stop(self, number: int) -> None:
        """Asks the job to save and end, as signal ``number`` would."""
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
            self.reusable_slots = self.supervisor.slots.hand_over_slots()
        self.send_event(JobEndedEvent(verdict, why, lost).to_json())
        if not lost:  # Ray would not answer
            self.supervisor.release_slots()


def failed_from_outside(verdict: outcome.Verdict) -> bool:
    """Whether a failure says nothing about the trial's own configuration, so that another try may succeed."""
    return verdict.kind == "failed" and verdict.fault in (*restart_policy.FROM_OUTSIDE, "hung")


def best_trials(trials: Sequence[Trial], directions: Sequence[str]) -> list[Trial]:
    """The best of the finished trials; with several metrics their Pareto front: those that no other dominates."""
    signs = [1.0 if direction == "minimize" else -1.0 for direction in directions]
    points = {
        trial.number: [sign * value for sign, value in zip(signs, trial.values, strict=True)]
        for trial in trials
        if trial.state == "done" and trial.values
    }
    if len(directions) == 1 and points:
        return [trials[min(points, key=lambda number: points[number])]]
    return [trials[number] for number in pareto_front(points)]
