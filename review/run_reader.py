"""Reads run folders into RunRecords. Their files are untrusted or damaged; nothing here raises."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from review.lenient_io import finite_number, is_locked, read_json_lines, read_json_object
from review.rank_times import RankWindow, read_rank_windows
from review.sweep_reader import (
    VAL_LOSS_GOAL,
    Goal,
    SweepRecord,
    TrialSummary,
    find_sweep_folders,
    read_sweep,
)
from train.config.sweep_dir import FINAL, LEDGER
from train.util.format import plural
from train.util.reading import UNREADABLE, parse_yaml, reason
from train.util.run_layout import RunDir

Floats = NDArray[np.float64]

SPEED = ("tokens_per_s", "mfu", "mfu_measured", "gpu_peak_gib")
METRICS = ("loss", "val_loss", "bits_per_byte", "tokens", "grad_norm", "lr", *SPEED)
_FILES = RunDir(Path())
RUN_FILES = tuple(file.name for file in (_FILES.config, _FILES.metrics, _FILES.starts, _FILES.summary, _FILES.lock))
"""A folder that holds one of these is a run folder."""
MAX_CONFIG_VALUES, MAX_CONFIG_BYTES = 5_000, 1 << 20
"""Limits of a config.yaml: a larger one is not ours, and may be crafted to exhaust memory."""

LEGEND_WIDTH = 32
"""Characters in a line of a legend."""


@dataclass
class RunRecord:
    """One run folder as read: configuration, metrics, samples, summary, and its sweep and trial if it has them."""

    folder: Path
    name: str
    state: str = "empty"
    """done, running, stopped, empty, broken or missing; a sweep's trial also pruned, diverged, failed or cut off."""
    notes: list[str] = field(default_factory=list)
    """Damage of files, and how the last start ended."""
    end_reason: str = ""
    """One line on why a trial ended before its last step."""
    config: dict[str, Any] = field(default_factory=dict)
    """Flat keys: optimizer.lr -> 0.001."""
    steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, Floats] = field(default_factory=dict)
    """METRICS at each logged step, shape of ``steps``, NaN where not measured; and ``seconds`` of training so far."""
    rank_windows: list[RankWindow] = field(default_factory=list)
    """Seconds of a step by rank, over time."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    run_json: dict[str, Any] = field(default_factory=dict)
    """Content of run.json."""
    startup: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""
    """Fingerprint of the corpus."""
    sweep: SweepRecord | None = None
    trial: TrialSummary | None = None
    """Its entry in the ledger of that sweep."""
    goal: Goal = VAL_LOSS_GOAL
    """The metric that runs are compared by: the first goal of their common sweep, else held-out loss."""

    @property
    def legend_label(self) -> str:
        """Name in a legend; for a trial its number and its values, cut at LEGEND_WIDTH."""
        if not self.trial or not self.trial.params:
            return self.name
        text = f"{self.folder.name}: {', '.join(map(str, self.trial.params.values()))}"
        return text if len(text) <= LEGEND_WIDTH else text[: LEGEND_WIDTH - 3] + "..."

    @property
    def val_loss(self) -> float | None:
        """Held-out loss in nats per token: over all held-out text if the run is finished, else the last measured."""
        val_loss = finite_number(self.summary.get("val_loss"))
        if val_loss is None and len(self.steps):
            measured = self.columns["val_loss"][~np.isnan(self.columns["val_loss"])]
            val_loss = float(measured[-1]) if len(measured) else None
        return val_loss

    @property
    def tokens(self) -> float | None:
        """Number of tokens trained on."""
        tokens = finite_number(self.summary.get("tokens"))
        return tokens if tokens is not None or not len(self.steps) else finite_number(self.columns["tokens"][-1])

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of wall time of all starts by cause, as far as the run records them."""
        for by_cause in (self.summary.get("time_by_cause"), self.run_json.get("seconds")):
            if isinstance(by_cause, dict):
                return {
                    str(cause): v
                    for cause, value in by_cause.items()
                    if (v := finite_number(value)) is not None and v > 0
                }
        return {}

    @property
    def wall_s(self) -> float | None:
        """Seconds of wall time of all starts."""
        return finite_number(self.summary.get("wall_s")) or sum(self.seconds.values()) or None

    @property
    def goodput(self) -> float | None:
        """Share of the wall time spent on steps that count."""
        goodput = finite_number(self.summary.get("goodput"))
        if goodput is None and self.seconds:
            return self.seconds.get("train", 0.0) / sum(self.seconds.values())
        return goodput

    def speed(self, name: str) -> float | None:
        """One of SPEED: of the whole last start if the run is finished, else the last logged."""
        value = finite_number(self.summary.get(name))
        return value if value is not None or not len(self.steps) else finite_number(self.columns[name][-1])

    @property
    def score(self) -> float | None:
        """The newest value of ``goal``."""
        return self.goal_value(self.goal)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """All goals of its sweep if it is compared by the sweep's first goal, else ``goal`` alone."""
        return self.sweep.goals if self.sweep and self.sweep.goals[0] == self.goal else (self.goal,)

    def goal_value(self, goal: Goal) -> float | None:
        """The value of a goal's metric, or None if not measured."""
        if goal.metric == "val_loss":
            return self.val_loss
        if self.sweep and self.trial and goal in self.sweep.goals[: len(self.trial.values)]:
            return self.trial.values[self.sweep.goals.index(goal)]
        return finite_number(self.summary.get(goal.metric))

    def config_value(self, key: str) -> Any:
        """A key's value in the configuration, or the choice of a group (such as model) by the sweep, else None."""
        return self.config.get(key, self.trial.params.get(key) if self.trial else None)

    def config_values(self, keys: Sequence[str]) -> list[Any]:
        """The values of several keys, as ``config_value`` has them."""
        return [self.config_value(key) for key in keys]


def find_run_folders(paths: list[Path]) -> list[Path]:
    """The run folders among ``paths`` and two levels below them; a path without any is returned itself."""
    folders: list[Path] = []
    for path in paths:
        below = [] if _is_run(path) else [*sorted(path.glob("*")), *sorted(path.glob("*/*"))]
        inner = [p for p in below if p.is_dir()]
        runs = [p for p in inner if _is_run(p)]
        holding_runs = set(runs).union(*(run.parents for run in runs))
        empty = [p for p in inner if p.parent == path and p not in holding_runs]
        folders += sorted(runs + empty, key=_natural_order) or [path]
    return list(dict.fromkeys(folders))


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts run2 before run10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", str(path))]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def read_runs(paths: Sequence[Path], exclude: Path | None = None) -> list[RunRecord]:
    """All runs in ``paths`` except ``exclude``, and trials of whole sweeps that ended before they had a folder."""
    folders = find_run_folders(list(paths))
    if exclude is not None:
        folders = [folder for folder in folders if os.path.realpath(folder) != os.path.realpath(exclude)]
    whole = list(dict.fromkeys(find_sweep_folders(list(paths))))
    parents = [folder.parent for folder in folders]
    sweeps = {folder: read_sweep(folder) for folder in dict.fromkeys([*whole, *parents])}
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
    """The sweeps that these runs are trials of, each once."""
    return list({id(run.sweep): run.sweep for run in runs if run.sweep}.values())


def read_run(folder: Path, sweep: SweepRecord | None = None) -> RunRecord:
    """The run in ``folder``, whatever it holds, with its state and notes completed from the ledger of its ``sweep``."""
    run = RunRecord(folder, Path(os.path.realpath(folder)).name)
    if sweep and (trial := sweep.trial_of_folder(folder)):
        run.sweep, run.trial, run.name = sweep, trial, f"{sweep.name}-{folder.name}"
    if folder.is_dir():
        _read_files(run)
        run.state = _state(run)
    else:
        run.state = "missing"
        run.notes += [] if run.trial else ["there is no such folder"]
    if run.sweep and run.trial:
        _apply_ledger(run, run.sweep, run.trial)
    run.notes += _rank_errors(folder) if run.state in ("stopped", "cut off") else []
    return run


def _read_files(run: RunRecord) -> None:
    files = RunDir(run.folder)
    run.config = _read_config(run)
    run.name = str(run.config.get("run.name") or run.name)
    for name in ("summary", "startup", "environment"):
        setattr(run, name, read_json_object(run.folder / f"{name}.json", run.notes))
    run.run_json = read_json_object(files.starts, run.notes)
    run.corpus = str(read_json_object(files.corpus, run.notes).get("fingerprint") or "")
    _read_metrics(run)
    run.rank_windows = read_rank_windows(run.folder, run.notes)
    run.samples = [s for s in read_json_lines(files.samples, run.notes) if isinstance(s.get("step"), int)]
    if bad := read_json_lines(files.skipped, run.notes):
        run.notes.append(f"{plural(len(bad), 'step')} made again without rows that made its numbers bad")


def _state(run: RunRecord) -> str:
    files = RunDir(run.folder)
    if is_locked(files.lock, [files.starts, files.metrics]):
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


def _apply_ledger(run: RunRecord, sweep: SweepRecord, trial: TrialSummary) -> None:
    """Takes the state from the ledger, which outranks the look of the folder, unless the run has finished since."""
    if run.state == "done" and trial.state not in FINAL:
        trial.state = "done"
    if run.state not in ("running", "done"):
        run.state, run.end_reason = trial.state, sweep.early_end_text(trial)


def _rank_errors(folder: Path) -> list[str]:
    """The last line of the error of each rank of the last start, as far as the ranks could write it."""
    errors = []
    for file in sorted(RunDir(folder).logs.glob("*.end")):
        with contextlib.suppress(*UNREADABLE):
            end = json.loads(file.read_bytes())
            if end.get("error"):
                errors.append(f"{file.stem}: {str(end['error']).strip().splitlines()[-1]}")
    return errors


def _read_config(run: RunRecord) -> dict[str, Any]:
    file = RunDir(run.folder).config
    try:
        if not file.exists():
            return {}
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("too large")
        tree = parse_yaml(file.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError("no mapping")
        flat: dict[str, Any] = {}
        for key, value in _leaves(tree):
            flat[key] = value
            if len(flat) > MAX_CONFIG_VALUES:
                raise ValueError("too many values")
        return flat
    except UNREADABLE as error:
        run.notes.append(f"config.yaml cannot be read: {reason(error)[:200]}")
        return {}


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _leaf(value)


def _leaf(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    return _list_text(value) if isinstance(value, list) else repr(value)[:MAX_CONFIG_VALUES]


def _list_text(value: list[Any]) -> str:
    """A list on one line; nested lists and mappings are not expanded."""
    return "[" + ", ".join("..." if isinstance(v, list | dict) else str(v) for v in value[:100]) + "]"


def _read_metrics(run: RunRecord) -> None:
    by_step = {
        r["step"]: r
        for r in read_json_lines(RunDir(run.folder).metrics, run.notes)
        if type(r.get("step")) is int and 0 <= r["step"] < 1 << 53
    }
    run.steps = np.array(sorted(by_step), np.int64)
    rows = [by_step[step] for step in run.steps.tolist()]
    for name in METRICS:
        values = [finite_number(row.get(name)) for row in rows]
        run.columns[name] = np.array([math.nan if v is None else v for v in values], float)
    tokens, speed = run.columns["tokens"], run.columns["tokens_per_s"]
    spent = np.diff(tokens, prepend=0.0) / np.where(speed > 0, speed, math.nan)
    run.columns["seconds"] = np.cumsum(np.nan_to_num(spent, posinf=0.0, neginf=0.0))
