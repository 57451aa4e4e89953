"""A run's folder as it is found: finished, running, stopped, broken or empty. Nothing in it is trusted and nothing raises."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from review.lenient_io import finite_number, is_locked, read_json_lines, read_json_object
from review.sweep_reader import (
    FINAL,
    LEDGER,
    VAL_LOSS_GOAL,
    Goal,
    SweepRecord,
    TrialRecord,
    find_sweep_folders,
    read_sweep,
)
from train.util.format import plural

Floats = NDArray[np.float64]

COLUMNS = ("loss", "val_loss", "bits_per_byte", "tokens", "tokens_per_s", "grad_norm", "lr")
MARKS = ("config.yaml", "metrics.jsonl", "run.json", "summary.json", "lock")
"""What only a run's folder holds."""
MOST_VALUES, MOST_BYTES = 5_000, 1 << 20
"""Of a configuration: more is no configuration of ours, and may be made to exhaust the reader."""

LEGEND = 32
"""Characters of a legend's line."""


@dataclass
class RunRecord:
    """What one folder tells."""

    folder: Path
    name: str
    state: str = "empty"
    """done, running, stopped, empty, broken or missing; of a sweep's trial also pruned, diverged, failed or cut off."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know: what is damaged, how the last start ended."""
    end_reason: str = ""
    """A trial ended before its last step, in a line."""
    config: dict[str, Any] = field(default_factory=dict)
    """Flat: optimizer.lr -> 0.001."""
    steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, Floats] = field(default_factory=dict)
    """A value a logged step, each as long as ``steps``; not a number where there is none. ``seconds``: of training, so far."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    run_json: dict[str, Any] = field(default_factory=dict)
    """run.json"""
    startup: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""
    sweep: SweepRecord | None = None
    trial: TrialRecord | None = None
    """What the ledger of that sweep says of it."""
    goal: Goal = VAL_LOSS_GOAL
    """What runs are compared by: the first goal of the sweep that they are all of, else held-out loss."""

    @property
    def legend_label(self) -> str:
        """Its name in a legend: of a trial its number and values, as many as there is room for."""
        if not self.trial or not self.trial.params:
            return self.name
        text = f"{self.folder.name}: {', '.join(map(str, self.trial.params.values()))}"
        return text if len(text) <= LEGEND else text[: LEGEND - 3] + "..."

    @property
    def val_loss(self) -> float | None:
        """Held-out nats per token of all the held-out text, of a finished run; else the last one measured."""
        found = finite_number(self.summary.get("val_loss"))
        if found is None and len(self.steps):
            measured = self.columns["val_loss"][~np.isnan(self.columns["val_loss"])]
            found = float(measured[-1]) if len(measured) else None
        return found

    @property
    def tokens(self) -> float | None:
        """Tokens trained on."""
        found = finite_number(self.summary.get("tokens"))
        return found if found is not None or not len(self.steps) else finite_number(self.columns["tokens"][-1])

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of all starts by its cause, as far as the run tells."""
        for found in (self.summary.get("time_by_cause"), self.run_json.get("seconds")):
            if isinstance(found, dict):
                return {
                    str(cause): v for cause, value in found.items() if (v := finite_number(value)) is not None and v > 0
                }
        return {}

    @property
    def wall_s(self) -> float | None:
        """Of all starts."""
        return finite_number(self.summary.get("wall_s")) or sum(self.seconds.values()) or None

    @property
    def goodput(self) -> float | None:
        """Share of that time that went into steps that count."""
        found = finite_number(self.summary.get("goodput"))
        return (
            found
            if found is not None or not self.seconds
            else self.seconds.get("train", 0.0) / sum(self.seconds.values())
        )

    @property
    def score(self) -> float | None:
        """What it is compared by, as far as it has come."""
        return self.goal_value(self.goal)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """All of its sweep's, where that is what it is compared by."""
        return self.sweep.goals if self.sweep and self.sweep.goals[0] == self.goal else (self.goal,)

    def goal_value(self, goal: Goal) -> float | None:
        """Its value of a goal."""
        if goal.metric == "val_loss":
            return self.val_loss
        if self.sweep and self.trial and goal in self.sweep.goals[: len(self.trial.values)]:
            return self.trial.values[self.sweep.goals.index(goal)]
        return finite_number(self.summary.get(goal.metric))

    def config_value(self, key: str) -> Any:
        """Of its configuration; or a group, such as model, that its sweep chose it by. None where it has no such key."""
        return self.config.get(key, self.trial.params.get(key) if self.trial else None)


def find_run_folders(places: list[Path]) -> list[Path]:
    """The run folders that ``places`` are or hold, two levels deep; a place that is neither is returned itself."""
    found: list[Path] = []
    for place in places:
        inner = (
            [] if _is_run(place) else [p for pattern in ("*", "*/*") for p in sorted(place.glob(pattern)) if p.is_dir()]
        )
        runs = [p for p in inner if _is_run(p)]
        empty = [p for p in inner if p.parent == place and not any(p in (r, *r.parents) for r in runs)]
        found += sorted(runs + empty, key=_natural) or [place]
    return list(dict.fromkeys(found))


def _natural(path: Path) -> list[tuple[int, str]]:
    """So that run2 comes before run10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", str(path))]


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def read_runs(places: Sequence[Path], but: Path | None = None) -> list[RunRecord]:
    """The runs that ``places`` are or hold, but ``but``; with the trials of sweeps that ended before they had a folder."""
    folders = [folder for folder in find_run_folders(list(places)) if but is None or folder.resolve() != but.resolve()]
    whole = list(dict.fromkeys(find_sweep_folders(list(places))))
    sweeps = {folder: read_sweep(folder) for folder in dict.fromkeys([*whole, *(folder.parent for folder in folders)])}
    for sweep in filter(None, map(sweeps.get, whole)):
        ended = [
            sweep.trial_folder(number)
            for number, trial in sweep.trials.items()
            if trial.state not in ("queued", "cut off")
        ]
        folders += [folder for folder in ended if not folder.exists()]
    runs = [read_run(folder, sweeps.get(folder.parent)) for folder in folders if not (folder / LEDGER).is_file()]
    goals = {run.sweep.goals[0] if run.sweep else VAL_LOSS_GOAL for run in runs}
    for run in runs:
        run.goal = goals.copy().pop() if len(goals) == 1 else VAL_LOSS_GOAL
    return runs


def sweeps_of(runs: Sequence[RunRecord]) -> list[SweepRecord]:
    """The sweeps that these runs are trials of."""
    return list({id(run.sweep): run.sweep for run in runs if run.sweep}.values())


def read_run(folder: Path, sweep: SweepRecord | None = None) -> RunRecord:
    """What ``folder`` tells, whatever is in it, and what the ledger of its ``sweep`` adds."""
    run = RunRecord(folder, folder.resolve().name)
    if sweep and (trial := sweep.trial_of_folder(folder)):
        run.sweep, run.trial, run.name = sweep, trial, f"{sweep.name}-{folder.name}"
    if folder.is_dir():
        _files(run)
        run.state = _state(run)
    else:
        run.state = "missing"
        run.notes += [] if run.trial else ["there is no such folder"]
    if run.sweep and run.trial:
        _judged(run, run.sweep, run.trial)
    run.notes += _ends(folder) if run.state in ("stopped", "cut off") else []
    return run


def _files(run: RunRecord) -> None:
    run.config = _config(run)
    run.name = str(run.config.get("run.name") or run.name)
    for name in ("summary", "startup", "environment"):
        setattr(run, name, read_json_object(run.folder / f"{name}.json", run.notes))
    run.run_json = read_json_object(run.folder / "run.json", run.notes)
    run.corpus = str(read_json_object(run.folder / "corpus.json", run.notes).get("fingerprint") or "")
    _metrics(run)
    run.samples = [
        s for s in read_json_lines(run.folder / "samples.jsonl", run.notes) if isinstance(s.get("step"), int)
    ]
    if bad := read_json_lines(run.folder / "skipped.jsonl", run.notes):
        run.notes.append(f"{plural(len(bad), 'step')} made again without rows that made its numbers bad")


def _state(run: RunRecord) -> str:
    if is_locked(run.folder / "lock", [run.folder / "run.json", run.folder / "metrics.jsonl"]):
        return "running"
    patience = (
        finite_number(run.config.get("stop.patience")) or math.inf
    )  # a run may also end since nothing gets better
    if (finite_number(run.summary.get("step")) or 0) >= (finite_number(run.config.get("steps")) or 1) or (
        0 < patience <= (finite_number(run.summary.get("stale")) or 0)
    ):
        return "done"
    if len(run.steps):
        return "stopped"
    return "broken" if run.notes else "stopped" if run.config else "empty"


def _judged(run: RunRecord, sweep: SweepRecord, trial: TrialRecord) -> None:
    """What its ledger says goes before what its folder looks like; but for a run that has come to its end since."""
    if run.state == "done" and trial.state not in FINAL:
        trial.state = "done"
    if run.state not in ("running", "done"):
        run.state, run.end_reason = trial.state, sweep.early_end_text(trial)


def _ends(folder: Path) -> list[str]:
    """How the ranks of the last start ended, where they could still say it."""
    words = []
    for file in sorted((folder / "logs").glob("*.end")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            end = json.loads(file.read_text())
            if end.get("error"):
                words.append(f"{file.stem}: {str(end['error']).strip().splitlines()[-1]}")
    return words


def _config(run: RunRecord) -> dict[str, Any]:
    file = run.folder / "config.yaml"
    try:
        if not file.exists():
            return {}
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        tree = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("no mapping")
        flat: dict[str, Any] = {}
        for key, value in _leaves(tree):
            flat[key] = value
            if len(flat) > MOST_VALUES:
                raise ValueError("too many values")
        return flat
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        run.notes.append(f"config.yaml cannot be read: {str(error).strip().splitlines()[0][:200]}")
        return {}


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            plain = value is None or isinstance(value, str | int | float)
            yield (
                f"{prefix}{key}",
                value if plain else repr(value)[:MOST_VALUES] if not isinstance(value, list) else _listed(value),
            )


def _listed(value: list[Any]) -> str:
    """A list on one line; what lies inside it deeper is cut, not walked."""
    return "[" + ", ".join("..." if isinstance(v, list | dict) else str(v) for v in value[:100]) + "]"


def _metrics(run: RunRecord) -> None:
    by_step = {
        r["step"]: r
        for r in read_json_lines(run.folder / "metrics.jsonl", run.notes)
        if type(r.get("step")) is int and 0 <= r["step"] < 1 << 53
    }
    run.steps = np.array(sorted(by_step), np.int64)
    rows = [by_step[step] for step in run.steps.tolist()]
    for name in COLUMNS:
        values = [finite_number(row.get(name)) for row in rows]
        run.columns[name] = np.array([math.nan if v is None else v for v in values], float)
    tokens, speed = run.columns["tokens"], run.columns["tokens_per_s"]
    spent = np.diff(tokens, prepend=0.0) / np.where(speed > 0, speed, math.nan)
    run.columns["seconds"] = np.cumsum(np.nan_to_num(spent, posinf=0.0, neginf=0.0))
