"""How runs are told apart: one colour and one dash for each of a few, a scale from best to worst for many."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from review.run_differences import ranked_runs
from review.run_reader import RunRecord

COLORS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE")
"""Paul Tol's "bright" scheme: told apart by colour-blind eyes, and seen on white and on black."""
DASHES = ("solid", "dash")
MAX_DISTINCT = len(COLORS) * len(DASHES)
SCALE = ("#4257C4", "#7A3FA8", "#B33D98", "#E2667F", "#F5A35D", "#F3D250")
"""Best to worst where runs are many: a path of rising lightness, so that it reads without colour too."""
NEUTRAL = "#9A9A9A"
"""Of a run that is not on the scale."""
OUTLIER_FACTOR = 3.0
"""Worse than the best by more than so many times what the run in the middle is: all one colour, or the others would look alike."""


def score_range(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """(best, worst) of the scale: of the finished runs, or where none is, of all; None where nothing was measured."""
    order = [score for score, _ in ranked_runs(runs)]
    if not order:
        least = not runs or runs[0].goal.minimize
        order = sorted((score for run in runs if (score := run.score) is not None), reverse=not least)
    if not order:
        return None
    reach = OUTLIER_FACTOR * abs(median(order) - order[0])
    worst = (
        order[-1]
        if reach == 0 or abs(order[-1] - order[0]) < reach
        else order[0] + (reach if order[-1] > order[0] else -reach)
    )
    return order[0], worst


def scale_position(score: float, scale: tuple[float, float]) -> float:
    """Where a score stands on the scale, 0 for best and 1 for worst or worse."""
    best, worst = scale
    return min(max((score - best) / (worst - best), 0.0), 1.0) if worst != best else 0.0


def line_styles(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(colour, dash) of every run: its own where they are few, else its place on the scale, where it is finished."""
    if len(runs) <= MAX_DISTINCT:
        return [(COLORS[i % len(COLORS)], DASHES[i // len(COLORS)]) for i in range(len(runs))]
    scale, finished = score_range(runs), {id(run) for _, run in ranked_runs(runs)}
    found = []
    for run in runs:
        on = scale is not None and run.score is not None and (id(run) in finished or not finished)
        found.append((scale_color(scale_position(run.score or 0.0, scale)) if on and scale else NEUTRAL, "solid"))
    return found


def scale_color(place: float) -> str:
    """The colour at ``place`` of SCALE, 0 for best and 1 for worst."""
    at = place * (len(SCALE) - 1)
    i = min(int(at), len(SCALE) - 2)
    low, high = (tuple(int(SCALE[j][k : k + 2], 16) for k in (1, 3, 5)) for j in (i, i + 1))
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02X}" for a, b in zip(low, high, strict=True))


def loss_axis_range(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """The span of losses worth looking at: after the first tenth of each finished run (of each, where none is), whose fall would
    press all else flat; of many, without the worst.
    """
    tops, lows = [], []
    for run in [run for _, run in ranked_runs(runs)] or runs:
        skipped = len(run.steps) // 10
        rest = (
            np.concatenate([run.columns[name][skipped:] for name in ("loss", "val_loss")])
            if len(run.steps)
            else np.zeros(0)
        )
        known = rest[np.isfinite(rest)]
        if len(known):
            tops.append(float(np.quantile(known, 0.98)))
            lows.append(float(known.min()))
    if not tops:
        return None
    low, high = min(lows), max(tops) if len(tops) < MAX_DISTINCT else float(np.quantile(tops, 0.8))
    margin = 0.06 * (high - low)
    return (max(low - margin, low / 2), high + margin) if high > low else None
