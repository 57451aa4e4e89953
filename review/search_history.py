"""The trials of one sweep in the order of their numbers: score, state, and the best score so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from review.colors import NEUTRAL, scale_color, scale_position, score_range
from review.run_reader import RunRecord

KINDS = {"done": ("finished", "o"), "pruned": ("pruned", "v"), "diverged": ("diverged", "x"), "failed": ("failed", "x")}
"""Trial state -> (word of the legend, matplotlib marker). All other states are UNFINISHED."""
UNFINISHED = ("not finished", "s")
STATE_COLORS = {"diverged": "#C0392B", "failed": "#E67E22"}
MARGIN = 0.06
"""Share of the score range that the axis extends beyond it."""


@dataclass(frozen=True)
class TrialDot:
    """One trial in the chart. Without a score, or with one off the scale, it is drawn at the worst end."""

    run: RunRecord
    number: int
    kind: str
    marker: str
    color: str
    shown: float
    """The score at which it is drawn."""


@dataclass(frozen=True)
class SearchHistory:
    """All trials of one sweep that have started."""

    dots: tuple[TrialDot, ...]
    best: tuple[tuple[int, float], ...]
    """(trial, score) at each finished trial that improved on all before, and the last trial with the best score."""
    range: tuple[float, float]
    """(low, high) of the axis of scores."""


def search_history(runs: Sequence[RunRecord]) -> SearchHistory | None:
    """The history of the one sweep that ``runs`` are trials of; None for other runs, or without a score."""
    scale = score_range(runs)
    if scale is None or len(runs) < 2 or not all(run.trial and run.sweep is runs[0].sweep for run in runs):
        return None
    (best_score, worst), minimize = scale, runs[0].goal.minimize
    reach = abs(worst - best_score) or abs(best_score) or 1.0
    end = best_score + (1 + MARGIN) * (reach if minimize else -reach)
    dots: list[TrialDot] = []
    best: list[tuple[int, float]] = []
    for run in sorted(runs, key=lambda run: int(run.folder.name)):
        kind, marker = KINDS.get(run.state, UNFINISHED)
        number, score = int(run.folder.name), run.score
        color = STATE_COLORS.get(run.state, NEUTRAL)
        if run.state == "done" and score is not None:
            color = scale_color(scale_position(score, scale))
            if not best or (score < best[-1][1]) == minimize:
                best.append((number, score))
        shown = end if score is None or run.state in STATE_COLORS else min(score, end) if minimize else max(score, end)
        dots.append(TrialDot(run, number, kind, marker, color, shown))
    best += [(dots[-1].number, best[-1][1])] if best else []
    sign = 1 if minimize else -1
    low, high = sorted((best_score - sign * 2 * MARGIN * reach, end + sign * MARGIN * reach))
    return SearchHistory(tuple(dots), tuple(best), (low, high))
