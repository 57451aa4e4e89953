"""Axes for parallel coordinates: where each value of a key stands between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from review.compare import ASIDE, differing, ranked
from review.read import Run, number

MOST = 12
"""Axes that fit beside each other."""


@dataclass(frozen=True)
class Axis:
    """A key: its values are placed by number, by logarithm where they span more than a factor of 8, or by name."""

    key: str
    kind: str
    """linear, log or name."""
    low: float
    high: float
    names: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Parallel:
    """The axes, the last one held-out loss; and the finished runs with their value on each axis."""

    axes: list[Axis]
    runs: list[Run]
    values: list[list[Any]]


def axes_of(runs: Sequence[Run]) -> Parallel | None:
    """None for fewer than two finished runs, or where nothing differs between them."""
    order = [run for _, run in ranked(runs)]
    keys = differing(order, ASIDE)[: MOST - 1]
    if len(order) < 2 or not keys:
        return None
    values = [[run.config.get(key) for key in keys] + [run.val_loss] for run in order]
    columns = list(zip(*values, strict=True))
    return Parallel([axis(key, column) for key, column in zip([*keys, "val_loss"], columns, strict=True)], order, values)


def axis(key: str, values: Sequence[Any]) -> Axis:
    """The axis for these values of a key."""
    numbers = [n for value in values if (n := number(value)) is not None]
    if len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        kind = "log" if low > 0 and high / low > 8 else "linear"
        marks = sorted(set(numbers))
        if len(marks) > 6:
            marks = [low, math.sqrt(low * high) if kind == "log" else (low + high) / 2, high]
        made = Axis(key, kind, low, high, (), ())
        return Axis(key, kind, low, high, (), tuple((place(made, mark), f"{mark:.4g}") for mark in marks))
    names = tuple(sorted({str(value) for value in values}))
    made = Axis(key, "name", 0, len(names) - 1, names, ())
    return Axis(key, "name", 0, len(names) - 1, names, tuple((place(made, name), name[:24]) for name in names[:30]))


def place(axis: Axis, value: Any) -> float:
    """Between 0 and 1; the middle where all values are one."""
    at = float(axis.names.index(str(value))) if axis.kind == "name" else number(value) or 0.0
    low, high = axis.low, axis.high
    if axis.kind == "log":
        at, low, high = math.log(at), math.log(low), math.log(high)
    return (at - low) / (high - low) if high > low else 0.5
