"""Parallel coordinates: an axis for each key that differs and each goal, positions from 0 to 1."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from review.lenient_io import finite_number
from review.run_differences import NOT_TRAINING, differing_keys, ranked_runs
from review.run_reader import RunRecord
from train.config.sweep_dir import ENDED

MAX_AXES = 12
"""So many axes fit side by side."""
MIN_TICK_GAP = 0.045
"""Least distance of two ticks whose labels do not overlap."""


@dataclass(frozen=True)
class ParallelAxis:
    """The axis of one key: its scale, range and ticks."""

    key: str
    kind: str
    """linear, log or name (one position for each name)."""
    low: float
    high: float
    names: tuple[str, ...]
    """Of an axis of names, in alphabetical order."""
    ticks: tuple[tuple[float, str], ...]
    """(position, label), from low to high."""


@dataclass(frozen=True)
class ParallelCoordinates:
    """Axes of keys, then of goals, and the runs with their values on them."""

    axes: list[ParallelAxis]
    runs: list[RunRecord]
    """Finished runs, best first, then trials that ended early."""
    values: list[list[Any]]
    """A row for each run, a value for each axis. Rows of trials that ended early stop before the goals."""


def parallel_coordinates(runs: Sequence[RunRecord]) -> ParallelCoordinates | None:
    """The axes and lines of ``runs``; None for fewer than two finished runs, or if no key differs between them."""
    order = [run for _, run in ranked_runs(runs)]
    early = [run for run in runs if run.trial and run.state in ENDED and run.state != "done"]
    keys = differing_keys([*order, *early], NOT_TRAINING)[: MAX_AXES - 1]
    if len(order) < 2 or not keys:
        return None
    goals = order[0].goals
    values = [run.config_values(keys) for run in (*order, *early)]
    spaces = order[0].sweep.spaces if order[0].sweep else {}
    columns = zip(*values, strict=True)
    axes = [build_axis(key, column, spaces.get(key, "")) for key, column in zip(keys, columns, strict=True)]
    measured = [list(map(run.goal_value, goals)) for run in order]
    columns = zip(*measured, strict=True)
    axes += [build_axis(goal.metric, column) for goal, column in zip(goals, columns, strict=True)]
    measured += [[] for _ in early]
    return ParallelCoordinates(axes, [*order, *early], [own + more for own, more in zip(values, measured, strict=True)])


def build_axis(key: str, values: Sequence[Any], space: str = "") -> ParallelAxis:
    """The axis for a key's ``values``: log or linear as the sweep's ``space`` says, else log beyond a factor of 8."""
    numbers = [n for value in values if (n := finite_number(value)) is not None]
    if len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        tags = re.match(r"tag\(([^(]*),", space)
        log = "log" in tags[1] if tags else "interval(" not in space and high > 8 * low
        bare = ParallelAxis(key, "log" if low > 0 and log else "linear", low, high, (), ())
        ticks = [(axis_position(bare, value), f"{value:.4g}") for value in _tick_values(bare, numbers)]
    else:
        names = tuple(sorted({str(value) for value in values}))
        bare = ParallelAxis(key, "name", 0, len(names) - 1, names, ())
        ticks = [(axis_position(bare, name), name[:24]) for name in names]
    return replace(bare, ticks=_readable_ticks(ticks))


def axis_position(axis: ParallelAxis, value: Any) -> float:
    """Position of a value on its axis, 0 to 1; 0.5 if the axis has one value only."""
    at = float(axis.names.index(str(value))) if axis.kind == "name" else finite_number(value) or 0.0
    low, high = axis.low, axis.high
    if axis.kind == "log":
        at, low, high = math.log(at), math.log(low), math.log(high)
    return (at - low) / (high - low) if high > low else 0.5


def _tick_values(axis: ParallelAxis, numbers: Sequence[float]) -> list[float]:
    """Tick values: the distinct ``numbers`` if there are at most six, else both ends and round numbers between."""
    values, low, high = sorted(set(numbers)), axis.low, axis.high
    if len(values) <= 6:
        return values
    if axis.kind == "log" and high >= 100 * low:
        between = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    elif axis.kind == "log":
        between = [low * (high / low) ** (i / 4) for i in (1, 2, 3)]
    else:
        step = 10 ** math.floor(math.log10((high - low) / 2))
        step = step if (high - low) / step < 6 else 5 * step if (high - low) / step > 12 else 2 * step
        between = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return sorted({low, high, *between})


def _readable_ticks(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """The ticks whose labels do not overlap: both ends, and each that is far enough from the last kept one."""
    kept: list[tuple[float, str]] = list(ticks[:1])
    for at, text in ticks[1:-1]:
        if at - kept[-1][0] >= MIN_TICK_GAP and ticks[-1][0] - at >= MIN_TICK_GAP:
            kept.append((at, text))
    return (*kept, *ticks[1:][-1:])
