"""Thins long curves while keeping their extremes, and averages them before they are thinned."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def extreme_indices(curves: list[Floats], max_points: int) -> NDArray[np.int64]:
    """Indices to keep, about ``max_points`` at most: the minimum and maximum of every curve in each bin, and both ends.

    All curves have the same length (n,); NaN is never an extreme. Returns sorted indices into 0..n-1.
    """
    n = len(curves[0]) if curves else 0
    if n <= max_points:
        return np.arange(n)
    edges = np.linspace(0, n, max(2, max_points // (2 * len(curves))) + 1).astype(int)
    kept = {0, n - 1}
    for curve in curves:
        for start, stop in itertools.pairwise(edges):
            window = curve[start:stop]
            if np.isfinite(window).any():
                kept |= {int(start + np.nanargmin(window)), int(start + np.nanargmax(window))}
    return np.array(sorted(kept))


def moving_average(values: Floats, share: float) -> Floats:
    """Centred mean over a window of ``share`` of the curve, shorter at the ends. Ignores non-finite values."""
    reach = int(len(values) * share / 2)
    if reach == 0:
        return values
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    indices = np.arange(len(values))
    start, stop = np.maximum(indices - reach, 0), np.minimum(indices + reach + 1, len(values))
    count = counts[stop] - counts[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)
