"""A sweep's ledger as it is found: what was tried, and what became of it. Nothing in it is trusted and nothing raises.

The ledger's form is that of ``cluster/sweep/ledger.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from review.lenient_io import finite_number, is_locked, read_json_lines
from train.util.format import plural

LEDGER, LOCK = "ledger.jsonl", "sweep.lock"
FINAL = ("done", "pruned", "diverged")
"""Ends that another start would not change."""
STATES = (*FINAL, "failed", "stopped")
"""Ends that a ledger knows."""
MOST = 100_000
"""No sweep has more trials: a larger number is damage."""


@dataclass(frozen=True)
class Goal:
    """What is to be as small, or as large, as possible."""

    metric: str = "val_loss"
    minimize: bool = True

    @property
    def label(self) -> str:
        """How it is spoken of."""
        return "held-out loss" if self.metric == "val_loss" else self.metric

    @property
    def unit(self) -> str:
        """Of differences."""
        return "nats per token" if self.metric == "val_loss" else self.metric

    @property
    def axis_title(self) -> str:
        """Of an axis or a scale."""
        return f"{self.label} ({self.unit})" if self.label != self.unit else self.label


VAL_LOSS_GOAL = Goal()


@dataclass
class TrialRecord:
    """What the ledger says of a trial."""

    params: dict[str, Any] = field(default_factory=dict)
    """Its own choices: key, or group, and value."""
    state: str = "queued"
    """queued, cut off (it has started, and its driver ended before it did), or one of STATES."""
    step: int = 0
    values: list[float] = field(default_factory=list)
    """Of the goals."""
    end_reason: str = ""


@dataclass
class SweepRecord:
    """What a ledger tells."""

    folder: Path
    name: str
    sampler: str = "grid"
    pruner: str = "none"
    goals: tuple[Goal, ...] = (VAL_LOSS_GOAL,)
    spaces: dict[str, str] = field(default_factory=dict)
    """What each key was tried of, as it was typed."""
    trials_requested: int = 0
    """Trials that it was begun with the wish for."""
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    running: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def varied_keys(self) -> list[str]:
        """What its trials differ in."""
        return list(dict.fromkeys(key for trial in self.trials.values() for key in trial.params))

    def trial_folder(self, trial: int) -> Path:
        """The run's."""
        return self.folder / f"{trial:03}"

    def trial_of_folder(self, folder: Path) -> TrialRecord | None:
        """The trial whose run is in ``folder``."""
        return self.trials.get(int(folder.name)) if re.fullmatch(r"\d{3,6}", folder.name) else None

    def early_end_text(self, trial: TrialRecord) -> str:
        """Why it did not come to its last step, in a line; empty where it did."""
        if trial.state == "pruned":
            seen = f" with {self.goals[0].metric} {trial.values[0]:.4g}" if trial.values else ""
            return f"ended early by the {self.pruner} pruner at step {trial.step:,}{seen}"
        if trial.state == "cut off" and not self.running:
            return "its sweep was cut off; the same command goes on with it"
        lines = trial.end_reason.strip().splitlines() or [""]
        return lines[-1 if lines[0].startswith("Traceback") else 0][:400]

    def status_text(self) -> str:
        """How it stands, in a line or two."""
        states = Counter("running" if self.running and t.state == "cut off" else t.state for t in self.trials.values())
        counts = ", ".join(f"{states[s]} {s}" for s in (*STATES, "running", "cut off", "queued") if states[s])
        how = self.sampler + (f", {self.pruner} pruner" if self.pruner != "none" else "")
        ended = sum(states[s] for s in STATES if s != "stopped")
        begun = plural(max(self.trials_requested, len(self.trials)), "trial")
        found = f"Sweep {self.name} ({how}) of {', '.join(self.varied_keys) or 'nothing yet'}: {begun}" + (
            f": {counts}." if counts else "."
        )
        if self.running:
            return f"{found} It is running."
        if ended < max(self.trials_requested, len(self.trials)):
            return f"{found} It has not come to its end: the same command goes on."
        return found + (" The same command tries again what failed." if states["failed"] else "")


def read_sweep(folder: Path) -> SweepRecord | None:
    """The sweep in ``folder``; None where it holds no ledger."""
    if not (folder / LEDGER).is_file():
        return None
    sweep = SweepRecord(folder, folder.resolve().name)
    for record in read_json_lines(folder / LEDGER, sweep.notes):
        match record.get("event"):
            case "sweep":
                _begin(sweep, record)
            case "trial" | "start" | "end" as event:
                _take(sweep, event, record)
    sweep.running = is_locked(folder / LOCK, [folder / LEDGER])
    return sweep


def _begin(sweep: SweepRecord, record: dict[str, Any]) -> None:
    settings = _dict(record.get("sweep"))
    sweep.name = str(settings.get("name") or sweep.name)
    sweep.sampler, sweep.pruner = (
        str(settings.get(key) or was) for key, was in (("sampler", "grid"), ("pruner", "none"))
    )
    sweep.spaces = {key: str(text) for key, text in _dict(record.get("axes")).items()}
    metrics, ways = (v if isinstance(v, list) else [v] for v in (settings.get("metric"), settings.get("direction")))
    ways = ways * len(metrics) if len(ways) == 1 else ways
    goals = [
        Goal(metric, way != "maximize") for metric, way in zip(metrics, ways, strict=False) if isinstance(metric, str)
    ]
    sweep.goals = tuple(goals) or sweep.goals
    grid = record.get("grid")
    for i, params in enumerate(grid[:MOST] if isinstance(grid, list) else []):
        sweep.trials[i] = TrialRecord(_params(params))
    sweep.trials_requested = len(sweep.trials) if isinstance(grid, list) else _whole(settings.get("trials"))


def _take(sweep: SweepRecord, event: str, record: dict[str, Any]) -> None:
    place = record.get("trial")
    if type(place) is not int or not 0 <= place < MOST:
        return
    trial = sweep.trials.setdefault(place, TrialRecord())
    if event == "trial":
        trial.params = _params(record.get("params"))
    elif event == "start":
        trial.state = "cut off"
    elif record.get("state") in STATES:
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
    """A value from its text on the command line."""
    for kind in (int, float):
        try:
            return kind(text) if finite_number(kind(text)) is not None else text
        except ValueError:
            continue
    return text


def find_sweep_folders(places: list[Path]) -> Iterator[Path]:
    """The folders of sweeps that ``places`` are or hold."""
    for place in places:
        yield from (folder for folder in (place, *sorted(place.glob("*"))) if (folder / LEDGER).is_file())
