"""File names, trial states and Pareto order of a sweep, shared by its driver and the review."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

LEDGER = "ledger.jsonl"
"""A JSON line for each event of a trial; its form is described in ``cluster/sweep/ledger.py``."""
LOCK = "sweep.lock"
"""Locked by the driver for as long as it runs."""
RESULTS = "results.csv"
"""One row for each trial, written when the driver ends."""

FINAL = ("done", "pruned", "diverged")
"""States of a trial that ended for good: starting the sweep again does not repeat it."""
ENDED = (*FINAL, "failed", "stopped")
"""States that the ledger records when a trial ends."""

Key = TypeVar("Key", bound=Hashable)


def trial_dir(sweep_dir: Path, number: int) -> Path:
    """The run folder of trial ``number``: ``000``, ``001`` and so on inside the sweep's folder."""
    return sweep_dir / f"{number:03}"


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better. Lower is better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)


def pareto_front(points: Mapping[Key, Sequence[float]]) -> list[Key]:
    """The keys of the points that no other point dominates, in the order of ``points``. Lower is better."""

    def dominated(point: Sequence[float]) -> bool:
        return any(dominates(other, point) for other in points.values())

    return [key for key, point in points.items() if not dominated(point)]
