"""Colors of runs in charts, distinct for a few and by score for many, and the range of loss axes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from review.run_differences import ranked_runs
from review.run_reader import RunRecord

COLORS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE")
"""Paul Tol's "bright" scheme: distinct for color-blind readers, and visible on white and on black."""
DASHES = ("solid", "dash")
MAX_DISTINCT = len(COLORS) * len(DASHES)
"""Up to so many runs each have a color and dash of their own; more are colored by their score."""
SCALE = ("#4257C4", "#7A3FA8", "#B33D98", "#E2667F", "#F5A35D", "#F3D250")
"""Colors from best to worst, of rising lightness, so that the order is visible without color too."""
NEUTRAL = "#9A9A9A"
"""Grey, for a run that is not on the scale."""
OUTLIER_FACTOR = 3.0
"""The scale ends at so many times the median's distance from the best; else one bad run makes all others look alike."""


def score_range(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """(best, worst) score of the color scale: of the finished runs, or of all if none is; None without a score."""
    scores = [score for score, _ in ranked_runs(runs)]
    if not scores:
        minimize = not runs or runs[0].goal.minimize
        scores = sorted((score for run in runs if (score := run.score) is not None), reverse=not minimize)
    if not scores:
        return None
    best, worst = scores[0], scores[-1]
    reach = OUTLIER_FACTOR * abs(median(scores) - best)
    if reach != 0 and abs(worst - best) >= reach:
        worst = best + (reach if worst > best else -reach)
    return best, worst


def scale_position(score: float, scale: tuple[float, float]) -> float:
    """Position of a score on the scale (best, worst): 0 for best, 1 for worst or beyond."""
    best, worst = scale
    return min(max((score - best) / (worst - best), 0.0), 1.0) if worst != best else 0.0


def line_styles(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(color, dash) of every run: distinct ones for a few runs; for many the color of the score, grey if unfinished."""
    if len(runs) <= MAX_DISTINCT:
        return [(COLORS[i % len(COLORS)], DASHES[i // len(COLORS)]) for i in range(len(runs))]
    scale, finished = score_range(runs), {id(run) for _, run in ranked_runs(runs)}
    styles = []
    for run in runs:
        on_scale = run.score is not None and (id(run) in finished or not finished)
        color = scale_color(scale_position(run.score or 0.0, scale)) if scale and on_scale else NEUTRAL
        styles.append((color, "solid"))
    return styles


def scale_color(position: float) -> str:
    """The color of SCALE at ``position``, 0 for best and 1 for worst, interpolated in RGB."""
    index = position * (len(SCALE) - 1)
    i = min(int(index), len(SCALE) - 2)
    channels = zip(_rgb(SCALE[i]), _rgb(SCALE[i + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (index - i)):02X}" for a, b in channels)


def _rgb(color: str) -> list[int]:
    return [int(color[k : k + 2], 16) for k in (1, 3, 5)]


def loss_axis_range(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """Range of the loss axis, without the steep start of training; None if there is no range.

    The first tenth of each finished run (of every run, if none is finished) is left out, since its fall would flatten
    everything else. With many runs the worst fifth may lie outside.
    """
    tops, lows = [], []
    for run in [run for _, run in ranked_runs(runs)] or runs:
        if not len(run.steps):
            continue
        skipped = len(run.steps) // 10
        losses = np.concatenate([run.columns["loss"][skipped:], run.columns["val_loss"][skipped:]])
        losses = losses[np.isfinite(losses)]
        if len(losses):
            tops.append(float(np.quantile(losses, 0.98)))
            lows.append(float(losses.min()))
    if not tops:
        return None
    low, high = min(lows), max(tops) if len(tops) < MAX_DISTINCT else float(np.quantile(tops, 0.8))
    margin = 0.06 * (high - low)
    return (max(low - margin, low / 2), high + margin) if high > low else None
