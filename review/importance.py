"""Which keys of a sweep mattered: how much worse unseen runs are predicted when one key is shuffled among them.

A random forest learns held-out loss (or a sweep's own metric) from the keys that differ. It is trained on runs drawn with
replacement, and each key is then shuffled among the runs that were not drawn (permutation importance: Breiman 2001). Done again
and again, the spread says how far the figure can be trusted. Keys that go together share their importance.
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
    """Of one key, in what runs are compared by: how much the mean error grows; and the middle 80 % over the draws."""

    key: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ImportanceReport:
    """All keys, the most important first; and the share of unseen runs' variance that the forest explains."""

    keys: tuple[KeyImportance, ...]
    runs: int
    explained: float


def key_importances(runs: Sequence[RunRecord]) -> ImportanceReport | None:
    """None for fewer than LEAST_RUNS finished runs, or where nothing but the seed differs."""
    order = ranked_runs(runs)
    keys = [key for key in differing_keys([run for _, run in order], NOT_TRAINING) if key != "seed"]
    if len(order) < MIN_RUNS or not keys:
        return None
    x = np.array([encode_values([run.config_value(key) for _, run in order]) for key in keys]).T
    y = np.array([loss for loss, _ in order])
    rng = np.random.default_rng(0)
    found, right, wrong = [], 0.0, 0.0
    for seed in range(DRAWS):
        drawn = rng.integers(0, len(y), len(y))
        unseen = np.setdiff1d(np.arange(len(y)), drawn)
        if len(unseen) < 2:
            continue
        forest = RandomForestRegressor(30, random_state=seed).fit(x[drawn], y[drawn])
        wrong += float(((forest.predict(x[unseen]) - y[unseen]) ** 2).sum())
        right += float(((y[drawn].mean() - y[unseen]) ** 2).sum())
        shuffled = permutation_importance(
            forest, x[unseen], y[unseen], scoring="neg_mean_absolute_error", n_repeats=5, random_state=seed
        )
        found.append(shuffled.importances_mean)
    table = np.array(found)
    low, high = np.quantile(table, (0.1, 0.9), axis=0)
    rows = [
        KeyImportance(k, *map(float, v)) for k, v in zip(keys, zip(table.mean(0), low, high, strict=True), strict=True)
    ]
    return ImportanceReport(tuple(sorted(rows, key=lambda row: -row.mean)), len(y), 1 - wrong / max(right, 1e-12))


def encode_values(values: Sequence[object]) -> list[float]:
    """Numbers for the values of a key: themselves where all are numbers, else their places in alphabetical order."""
    numbers = [finite_number(value) for value in values]
    if all(n is not None for n in numbers):
        return [n if n is not None else math.nan for n in numbers]
    places = {text: float(i) for i, text in enumerate(sorted({str(value) for value in values}))}
    return [places[str(value)] for value in values]
