"""How runs are told apart: one colour and one dash for each of a few, a scale from best to worst for many."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from review.run_differences import ranked
from review.run_reader import Run

COLOURS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE")
"""Paul Tol's "bright" scheme: told apart by colour-blind eyes, and seen on white and on black."""
DASHES = ("solid", "dash")
FEW = len(COLOURS) * len(DASHES)
SCALE = ("#4257C4", "#7A3FA8", "#B33D98", "#E2667F", "#F5A35D", "#F3D250")
"""Best to worst where runs are many: a path of rising lightness, so that it reads without colour too."""
NONE = "#9A9A9A"
"""Of a run that is not on the scale."""
FAR = 3.0
"""Worse than the best by more than so many times what the run in the middle is: all one colour, or the others would look alike."""


def span(runs: Sequence[Run]) -> tuple[float, float] | None:
    """(best, worst) of the scale: of the finished runs, or where none is, of all; None where nothing was measured."""
    order = [score for score, _ in ranked(runs)]
    if not order:
        least = not runs or runs[0].goal.least
        order = sorted((score for run in runs if (score := run.score) is not None), reverse=not least)
    if not order:
        return None
    reach = FAR * abs(median(order) - order[0])
    worst = (
        order[-1]
        if reach == 0 or abs(order[-1] - order[0]) < reach
        else order[0] + (reach if order[-1] > order[0] else -reach)
    )
    return order[0], worst


def rank(score: float, scale: tuple[float, float]) -> float:
    """Where a score stands on the scale, 0 for best and 1 for worst or worse."""
    best, worst = scale
    return min(max((score - best) / (worst - best), 0.0), 1.0) if worst != best else 0.0


def colours(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(colour, dash) of every run: its own where they are few, else its place on the scale, where it is finished."""
    if len(runs) <= FEW:
        return [(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS)]) for i in range(len(runs))]
    scale, finished = span(runs), {id(run) for _, run in ranked(runs)}
    found = []
    for run in runs:
        on = scale is not None and run.score is not None and (id(run) in finished or not finished)
        found.append((blend(rank(run.score or 0.0, scale)) if on and scale else NONE, "solid"))
    return found


def blend(place: float) -> str:
    """The colour at ``place`` of SCALE, 0 for best and 1 for worst."""
    at = place * (len(SCALE) - 1)
    i = min(int(at), len(SCALE) - 2)
    low, high = (tuple(int(SCALE[j][k : k + 2], 16) for k in (1, 3, 5)) for j in (i, i + 1))
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02X}" for a, b in zip(low, high, strict=True))


def focus(runs: Sequence[Run]) -> tuple[float, float] | None:
    """The span of losses worth looking at: after the first tenth of each finished run (of each, where none is), whose fall would
    press all else flat; of many, without the worst.
    """
    tops, lows = [], []
    for run in [run for _, run in ranked(runs)] or runs:
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
    low, high = min(lows), max(tops) if len(tops) < FEW else float(np.quantile(tops, 0.8))
    margin = 0.06 * (high - low)
    return (max(low - margin, low / 2), high + margin) if high > low else None
