"""Reads a sweep's ledger: goals, trials, states. Its content is untrusted; nothing here raises.

The ledger's form is that of ``cluster/sweep/ledger.py``.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from review.lenient_io import finite_number, is_locked, read_json_lines
from train.config import sweep_dir
from train.config.sweep_dir import ENDED, LEDGER, LOCK
from train.util.format import plural

MAX_TRIALS = 100_000
"""No sweep has more trials: a larger number is damage."""


@dataclass(frozen=True)
class Goal:
    """A metric that runs are compared by, and whether lower or higher is better."""

    metric: str = "val_loss"
    minimize: bool = True

    @property
    def label(self) -> str:
        """The metric's name in sentences."""
        return "held-out loss" if self.metric == "val_loss" else self.metric

    @property
    def unit(self) -> str:
        """The unit of differences between scores."""
        return "nats per token" if self.metric == "val_loss" else self.metric

    @property
    def axis_title(self) -> str:
        """The title of an axis or a color scale."""
        return f"{self.label} ({self.unit})" if self.label != self.unit else self.label


VAL_LOSS_GOAL = Goal()


@dataclass
class TrialSummary:
    """A trial as the ledger records it."""

    params: dict[str, Any] = field(default_factory=dict)
    """Its own values: key (or group) -> value."""
    state: str = "queued"
    """queued, cut off (it has started, and its driver ended before it did), or one of sweep_dir.ENDED."""
    step: int = 0
    values: list[float] = field(default_factory=list)
    """Of the goals, in their order."""
    end_reason: str = ""


@dataclass
class SweepRecord:
    """A sweep as its ledger records it."""

    folder: Path
    name: str
    sampler: str = "grid"
    pruner: str = "none"
    goals: tuple[Goal, ...] = (VAL_LOSS_GOAL,)
    spaces: dict[str, str] = field(default_factory=dict)
    """Search space of each key, as typed on the command line."""
    trials_requested: int = 0
    """Number of trials asked for when the sweep was started."""
    trials: dict[int, TrialSummary] = field(default_factory=dict)
    running: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def varied_keys(self) -> list[str]:
        """Keys that the trials set, in the order of their first use."""
        return list(dict.fromkeys(itertools.chain.from_iterable(trial.params for trial in self.trials.values())))

    def trial_folder(self, trial: int) -> Path:
        """The run folder of a trial."""
        return sweep_dir.trial_dir(self.folder, trial)

    def trial_of_folder(self, folder: Path) -> TrialSummary | None:
        """The trial whose run folder is ``folder``, or None."""
        return self.trials.get(int(folder.name)) if re.fullmatch(r"\d{3,6}", folder.name) else None

    def early_end_text(self, trial: TrialSummary) -> str:
        """One line on why the trial ended before its last step; empty if it did not."""
        if trial.state == "pruned":
            score = f" with {self.goals[0].metric} {trial.values[0]:.4g}" if trial.values else ""
            return f"ended early by the {self.pruner} pruner at step {trial.step:,}{score}"
        if trial.state == "cut off" and not self.running:
            return "its sweep was cut off; the same command goes on with it"
        lines = trial.end_reason.strip().splitlines() or [""]
        return lines[-1 if lines[0].startswith("Traceback") else 0][:400]

    def status_text(self) -> str:
        """Name, sampler, keys and the count of trials by state, and whether the sweep runs or can be continued."""
        states = Counter("running" if self.running and t.state == "cut off" else t.state for t in self.trials.values())
        counts = ", ".join(f"{states[s]} {s}" for s in (*ENDED, "running", "cut off", "queued") if states[s])
        method = self.sampler + (f", {self.pruner} pruner" if self.pruner != "none" else "")
        ended = sum(states[s] for s in ENDED if s != "stopped")
        total = plural(max(self.trials_requested, len(self.trials)), "trial")
        text = f"Sweep {self.name} ({method}) of {', '.join(self.varied_keys) or 'nothing yet'}: {total}" + (
            f": {counts}." if counts else "."
        )
        if self.running:
            return f"{text} It is running."
        if ended < max(self.trials_requested, len(self.trials)):
            return f"{text} It has not come to its end: the same command goes on."
        return text + (" The same command tries again what failed." if states["failed"] else "")


def read_sweep(folder: Path) -> SweepRecord | None:
    """The sweep in ``folder``, or None if it holds no ledger."""
    if not (folder / LEDGER).is_file():
        return None
    sweep = SweepRecord(folder, Path(os.path.realpath(folder)).name)
    for record in read_json_lines(folder / LEDGER, sweep.notes):
        match record.get("event"):
            case "sweep":
                _read_head(sweep, record)
            case "trial" | "start" | "end" as event:
                _read_trial_event(sweep, event, record)
    sweep.running = is_locked(folder / LOCK, [folder / LEDGER])
    return sweep


def _read_head(sweep: SweepRecord, record: dict[str, Any]) -> None:
    settings = _dict(record.get("sweep"))
    sweep.name = str(settings.get("name") or sweep.name)
    sweep.sampler, sweep.pruner = (
        str(settings.get(key) or was) for key, was in (("sampler", "grid"), ("pruner", "none"))
    )
    sweep.spaces = {key: str(text) for key, text in _dict(record.get("axes")).items()}
    metrics, directions = (
        v if isinstance(v, list) else [v] for v in (settings.get("metric"), settings.get("direction"))
    )
    directions = directions * len(metrics) if len(directions) == 1 else directions
    goals = [
        Goal(metric, direction != "maximize")
        for metric, direction in zip(metrics, directions, strict=False)
        if isinstance(metric, str)
    ]
    sweep.goals = tuple(goals) or sweep.goals
    grid = record.get("grid")
    for i, params in enumerate(grid[:MAX_TRIALS] if isinstance(grid, list) else []):
        sweep.trials[i] = TrialSummary(_params(params))
    sweep.trials_requested = len(sweep.trials) if isinstance(grid, list) else _whole(settings.get("trials"))


def _read_trial_event(sweep: SweepRecord, event: str, record: dict[str, Any]) -> None:
    number = record.get("trial")
    if type(number) is not int or not 0 <= number < MAX_TRIALS:
        return
    trial = sweep.trials.setdefault(number, TrialSummary())
    if event == "trial":
        trial.params = _params(record.get("params"))
    elif event == "start":
        trial.state = "cut off"
    elif record.get("state") in ENDED:
        trial.state, trial.step, trial.end_reason = (
            record["state"],
            _whole(record.get("step")),
            str(record.get("why") or ""),
        )
        values = record.get("values")
        trial.values = [
            v for value in (values if isinstance(values, list) else []) if (v := finite_number(value)) is not None
        ]


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _params(value: Any) -> dict[str, Any]:
    return {key: _typed(str(text)) for key, text in _dict(value).items()}


def _typed(text: str) -> Any:
    """The number or string that a command-line value stands for."""
    for kind in (int, float):
        try:
            return kind(text) if finite_number(kind(text)) is not None else text
        except ValueError:
            continue
    return text


def find_sweep_folders(paths: list[Path]) -> Iterator[Path]:
    """The sweep folders among ``paths`` and their direct subfolders."""
    for path in paths:
        yield from (folder for folder in (path, *sorted(path.glob("*"))) if (folder / LEDGER).is_file())
