"""Permutation importance (Breiman 2001): which configuration keys mattered for the score.

A random forest learns held-out loss (or a sweep's own metric) from the keys that differ. It is trained on runs drawn
with replacement; then each key is shuffled among the runs that were not drawn, and the growth of the error is its
importance. The spread over DRAWS repetitions tells how far a value can be trusted. Correlated keys share their
importance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import RandomForestRegressor
from sklearn.inspection import permutation_importance

from review.lenient_io import finite_number
from review.run_differences import NOT_TRAINING, differing_keys, ranked_runs
from review.run_reader import RunRecord

MIN_RUNS = 8
DRAWS = 20


@dataclass(frozen=True)
class KeyImportance:
    """Importance of one key: growth of the mean absolute error of the score, and the middle 80 % of the draws."""

    key: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ImportanceReport:
    """All keys, most important first; number of runs; share of unseen runs' variance that is explained (R2)."""

    keys: tuple[KeyImportance, ...]
    runs: int
    explained: float


def key_importances(runs: Sequence[RunRecord]) -> ImportanceReport | None:
    """Importance of the keys that differ; None with fewer than MIN_RUNS finished runs, or if only the seed differs."""
    order = ranked_runs(runs)
    finished = [run for _, run in order]
    keys = [key for key in differing_keys(finished, NOT_TRAINING) if key != "seed"]
    if len(order) < MIN_RUNS or not keys:
        return None
    values = zip(*(run.config_values(keys) for run in finished), strict=True)
    x = np.array(list(map(encode_values, values))).T
    y = np.array([loss for loss, _ in order])
    rng = np.random.default_rng(0)
    draws, total_error, residual_error = [], 0.0, 0.0
    for seed in range(DRAWS):
        drawn = rng.integers(0, len(y), len(y))
        unseen = np.setdiff1d(np.arange(len(y)), drawn)
        if len(unseen) < 2:
            continue
        forest = RandomForestRegressor(30, random_state=seed).fit(x[drawn], y[drawn])
        residual_error += float(((forest.predict(x[unseen]) - y[unseen]) ** 2).sum())
        total_error += float(((y[drawn].mean() - y[unseen]) ** 2).sum())
        shuffled = permutation_importance(
            forest, x[unseen], y[unseen], scoring="neg_mean_absolute_error", n_repeats=5, random_state=seed
        )
        draws.append(shuffled.importances_mean)
    table = np.array(draws)
    low, high = np.quantile(table, (0.1, 0.9), axis=0)
    columns = zip(keys, table.mean(0), low, high, strict=True)
    rows = [KeyImportance(key, *map(float, values)) for key, *values in columns]
    return ImportanceReport(
        tuple(sorted(rows, key=lambda row: -row.mean)), len(y), 1 - residual_error / max(total_error, 1e-12)
    )


def encode_values(values: Sequence[object]) -> list[float]:
    """Values of a key as floats: themselves if all are numbers, else their index in alphabetical order."""
    numbers = [finite_number(value) for value in values]
    if all(n is not None for n in numbers):
        return [n if n is not None else math.nan for n in numbers]
    names = sorted({str(value) for value in values})
    codes = {name: float(i) for i, name in enumerate(names)}
    return [codes[str(value)] for value in values]
