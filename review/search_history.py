"""A sweep as it went: what each trial came to, in their order, and the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from review.colors import NEUTRAL, scale_color, scale_position, score_range
from review.run_reader import RunRecord

KINDS = {"done": ("finished", "o"), "pruned": ("pruned", "v"), "diverged": ("diverged", "x"), "failed": ("failed", "x")}
"""Words and matplotlib's marker for a state; all others are not finished."""
UNFINISHED = ("not finished", "s")
INK = {"diverged": "#C0392B", "failed": "#E67E22"}
MARGIN = 0.06


@dataclass(frozen=True)
class TrialDot:
    """A trial. Without a score, or with one that is off the scale, it stands at the worst end."""

    run: RunRecord
    number: int
    kind: str
    marker: str
    color: str
    shown: float


@dataclass(frozen=True)
class SearchHistory:
    """All trials of one sweep that have started."""

    dots: tuple[TrialDot, ...]
    best: tuple[tuple[int, float], ...]
    """Trial and score, wherever a finished trial was better than all before it, and the last trial with the best of all."""
    range: tuple[float, float]
    """Of the axis of scores."""


def search_history(runs: Sequence[RunRecord]) -> SearchHistory | None:
    """None where these are not the trials of one sweep, or they are fewer than two, or nothing was measured."""
    scale = score_range(runs)
    if scale is None or len(runs) < 2 or not all(run.trial and run.sweep is runs[0].sweep for run in runs):
        return None
    (first, worst), least = scale, runs[0].goal.minimize
    reach = abs(worst - first) or abs(first) or 1.0
    end = first + (1 + MARGIN) * (reach if least else -reach)
    dots: list[TrialDot] = []
    best: list[tuple[int, float]] = []
    for run in sorted(runs, key=lambda run: int(run.folder.name)):
        kind, marker = KINDS.get(run.state, UNFINISHED)
        number, score = int(run.folder.name), run.score
        graded = (
            scale_color(scale_position(score, scale))
            if run.state == "done" and score is not None
            else INK.get(run.state, NEUTRAL)
        )
        shown = end if score is None or run.state in INK else min(score, end) if least else max(score, end)
        dots.append(TrialDot(run, number, kind, marker, graded, shown))
        if run.state == "done" and score is not None and (not best or (score < best[-1][1]) == least):
            best.append((number, score))
    best += [(dots[-1].number, best[-1][1])] if best else []
    low, high = sorted(
        (first - (2 * MARGIN * reach if least else -2 * MARGIN * reach), end + (MARGIN if least else -MARGIN) * reach)
    )
    return SearchHistory(tuple(dots), tuple(best), (low, high))
