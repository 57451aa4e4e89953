"""Seconds of a step by rank: how far the ranks of a run are apart, which is the slowest, and whether it stays so."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from review.downsample import extreme_indices
from review.lenient_io import finite_number, read_json_lines
from train.util.run_layout import RunDir

NOTABLE = 1.2
"""Slowest rank over the median rank from which on a comment tells of it."""
MAX_WINDOWS = 200
"""Points of a run's curve."""


@dataclass(frozen=True)
class RankWindow:
    """Seconds that the ranks worked on a step, without their waits for each other, over some seconds up to ``step``."""

    step: int
    fastest_s: float
    median_s: float
    slowest_s: float
    slowest_rank: int

    @property
    def ratio(self) -> float:
        """The slowest rank's seconds over the median rank's."""
        return self.slowest_s / self.median_s


def read_rank_windows(folder: Path, notes: list[str]) -> list[RankWindow]:
    """The windows in ``ranks.jsonl`` of a run, by step; none where it has one rank only. Damage becomes a note."""
    windows: dict[int, RankWindow] = {}
    for line in read_json_lines(RunDir(folder).ranks, notes):
        seconds = [finite_number(line.get(f"rank_step_s_{name}")) for name in ("min", "median", "max")]
        fastest, median, slowest = (value or 0.0 for value in seconds)
        step, rank = line.get("step"), line.get("slowest_rank")
        if type(step) is int and type(rank) is int and 0 < fastest <= median <= slowest:
            windows[step] = RankWindow(step, fastest, median, slowest, rank)  # of a step made again, the last
    ordered = [windows[step] for step in sorted(windows)]
    return ordered if any(window.slowest_s > window.fastest_s for window in ordered) else []


def thin_windows(windows: Sequence[RankWindow]) -> list[RankWindow]:
    """As many of the windows as a chart shows, with the extremes of the slowest rank among them."""
    kept = extreme_indices([np.array([window.slowest_s for window in windows])], MAX_WINDOWS)
    return [windows[index] for index in kept.tolist()]


def slowest_rank_text(windows: Sequence[RankWindow]) -> str:
    """Which rank was the slowest most often and by how much: "rank 3 was the slowest in 12 of 15 windows, ..."."""
    counts = collections.Counter(window.slowest_rank for window in windows)
    rank, times = min(counts.items(), key=lambda item: (-item[1], item[0]))
    own = [window.ratio for window in windows if window.slowest_rank == rank]
    text = f"rank {rank} was the slowest in {times} of {len(windows)} windows, with {statistics.median(own):.2f} times "
    worst = max(windows, key=lambda window: window.ratio)
    text += f"the median rank's seconds; the widest spread was at step {worst.step:,}: {worst.fastest_s:.4g} to "
    return text + f"{worst.slowest_s:.4g} s, rank {worst.slowest_rank} the slowest"


def is_notable(windows: Sequence[RankWindow]) -> bool:
    """Whether the slowest rank is, in most windows, slow enough to tell of."""
    return bool(windows) and statistics.median(window.ratio for window in windows) >= NOTABLE
