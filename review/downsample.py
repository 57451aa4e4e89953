"""Long curves made short: the extremes stay, so no spike is lost; and averages of the whole curve, taken before it is thinned."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def extreme_indices(values: list[Floats], most: int) -> NDArray[np.int64]:
    """Which of n places to keep, at most about ``most``: in each stretch the lowest and the highest of every curve in ``values``.

    The first and the last place stay. The curves are as long as each other; what is not a number is never an extreme.
    """
    n = len(values[0]) if values else 0
    if n <= most:
        return np.arange(n)
    edges = np.linspace(0, n, max(2, most // (2 * len(values))) + 1).astype(int)
    kept = {0, n - 1}
    for curve in values:
        for start, stop in itertools.pairwise(edges):
            piece = curve[start:stop]
            if np.isfinite(piece).any():
                kept |= {int(start + np.nanargmin(piece)), int(start + np.nanargmax(piece))}
    return np.array(sorted(kept))


def moving_average(values: Floats, share: float) -> Floats:
    """The mean of the ``share`` of places around each place; shorter at the ends. Places without a number count for nothing."""
    reach = int(len(values) * share / 2)
    if reach == 0:
        return values
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    count = counts[stop] - counts[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)
