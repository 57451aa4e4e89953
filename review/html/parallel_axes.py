"""Axes for parallel coordinates: where each value of a key stands between 0 and 1."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from review.lenient_io import finite_number
from review.run_differences import NOT_TRAINING, differing_keys, ranked_runs
from review.run_reader import RunRecord
from review.sweep_reader import STATES

MAX_AXES = 12
"""Axes that fit beside each other."""
MIN_TICK_GAP = 0.045
"""Ticks nearer to each other than this would overlap."""


@dataclass(frozen=True)
class ParallelAxis:
    """A key: its values are placed by number, by logarithm, or by name."""

    key: str
    kind: str
    """linear, log or name."""
    low: float
    high: float
    names: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class ParallelCoordinates:
    """The axes, the last ones the goals; and the runs with their values on them."""

    axes: list[ParallelAxis]
    runs: list[RunRecord]
    """The finished ones, the best first; then trials that ended early."""
    values: list[list[Any]]
    """On each axis; those of a trial that ended early stop before the goals, since none of its values compares."""


def parallel_coordinates(runs: Sequence[RunRecord]) -> ParallelCoordinates | None:
    """None for fewer than two finished runs, or where nothing differs between them."""
    order = [run for _, run in ranked_runs(runs)]
    early = [run for run in runs if run.trial and run.state in STATES and run.state != "done"]
    keys = differing_keys([*order, *early], NOT_TRAINING)[: MAX_AXES - 1]
    if len(order) < 2 or not keys:
        return None
    goals = order[0].goals
    values = [[run.config_value(key) for key in keys] for run in (*order, *early)]
    spaces = order[0].sweep.spaces if order[0].sweep else {}
    axes = [
        build_axis(key, column, spaces.get(key, ""))
        for key, column in zip(keys, zip(*values, strict=True), strict=True)
    ]
    measured = [[run.goal_value(goal) for goal in goals] for run in order]
    axes += [build_axis(goal.metric, column) for goal, column in zip(goals, zip(*measured, strict=True), strict=True)]
    measured += [[] for _ in early]
    return ParallelCoordinates(axes, [*order, *early], [own + more for own, more in zip(values, measured, strict=True)])


def build_axis(key: str, values: Sequence[Any], space: str = "") -> ParallelAxis:
    """The axis for these values of a key: as its sweep has it where that says so, else logarithmic beyond a factor of 8."""
    numbers = [n for value in values if (n := finite_number(value)) is not None]
    if len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        log = (
            "log" in tags[1]
            if (tags := re.match(r"tag\(([^(]*),", space))
            else "interval(" not in space and high > 8 * low
        )
        kind = "log" if low > 0 and log else "linear"
        made = ParallelAxis(key, kind, low, high, (), ())
        return ParallelAxis(
            key,
            kind,
            low,
            high,
            (),
            _ticks([(axis_position(made, mark), f"{mark:.4g}") for mark in _marks(made, numbers)]),
        )
    names = tuple(sorted({str(value) for value in values}))
    made = ParallelAxis(key, "name", 0, len(names) - 1, names, ())
    return ParallelAxis(
        key, "name", 0, len(names) - 1, names, _ticks([(axis_position(made, name), name[:24]) for name in names])
    )


def axis_position(axis: ParallelAxis, value: Any) -> float:
    """Between 0 and 1; the middle where all values are one."""
    at = float(axis.names.index(str(value))) if axis.kind == "name" else finite_number(value) or 0.0
    low, high = axis.low, axis.high
    if axis.kind == "log":
        at, low, high = math.log(at), math.log(low), math.log(high)
    return (at - low) / (high - low) if high > low else 0.5


def _marks(axis: ParallelAxis, numbers: Sequence[float]) -> list[float]:
    """The values themselves where they are few; else the ends, and between them round numbers."""
    marks, low, high = sorted(set(numbers)), axis.low, axis.high
    if len(marks) <= 6:
        return marks
    if axis.kind == "log" and high >= 100 * low:
        between = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    elif axis.kind == "log":
        between = [low * (high / low) ** (i / 4) for i in (1, 2, 3)]
    else:
        step = 10 ** math.floor(math.log10((high - low) / 2))
        step = step if (high - low) / step < 6 else 5 * step if (high - low) / step > 12 else 2 * step
        between = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return sorted({low, high, *between})


def _ticks(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Those that can be read beside each other: the ends, and from below what is far enough from those kept and from the last."""
    kept: list[tuple[float, str]] = list(ticks[:1])
    for at, text in ticks[1:-1]:
        if at - kept[-1][0] >= MIN_TICK_GAP and ticks[-1][0] - at >= MIN_TICK_GAP:
            kept.append((at, text))
    return (*kept, *ticks[1:][-1:])
