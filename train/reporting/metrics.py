"""Every number that is reported of a model, one formula each, from sums over all ranks: the same for any count of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ConfusionMatrix = NDArray[Any]
"""A confusion matrix (C, C): how often a row's class was said to be a column's."""


def perplexity(loss: float) -> float:
    """exp of the loss in nats per token."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits that the model needs for a byte of text: comparable between tokenizers."""
    return nats / math.log(2) / text_bytes


def accuracy(table: ConfusionMatrix) -> float:
    """Share of what was said that is right: precision, recall and F1 over all classes together (micro) are the same number."""
    return _ratio(np.trace(table), table.sum())


def precision(table: ConfusionMatrix) -> Floats:
    """Of each class: the share of what was said to be it that is; 0 where nothing was."""
    return _ratios(np.diagonal(table), table.sum(0))


def recall(table: ConfusionMatrix) -> Floats:
    """Of each class: the share of what is it that was said to be; 0 where nothing is."""
    return _ratios(np.diagonal(table), table.sum(1))


def f1(table: ConfusionMatrix) -> Floats:
    """Of each class: 2 true positives / (2 true positives + false positives + false negatives), 0 where there are none."""
    return _ratios(2 * np.diagonal(table), table.sum(0) + table.sum(1))


def macro(values: Floats) -> float:
    """The mean over classes, each counting the same."""
    return float(values.mean())


def spearman(predictions: Floats, targets: Floats) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs; not a number where all of one side are equal."""
    a, b = (_ranks(values) - (len(values) + 1) / 2 for values in (predictions, targets))
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread else math.nan


def classification_metrics(table: ConfusionMatrix) -> dict[str, float]:
    """The numbers of a classifier."""
    return {
        "accuracy": accuracy(table),
        "precision_macro": macro(precision(table)),
        "recall_macro": macro(recall(table)),
        "f1_macro": macro(f1(table)),
        "f1_micro": accuracy(table),
    }


def per_class_metrics(table: ConfusionMatrix, names: list[str]) -> dict[str, Any]:
    """The numbers of each class, and the confusion matrix."""
    columns = {"precision": precision(table), "recall": recall(table), "f1": f1(table), "count": table.sum(1)}
    classes = {name: {key: float(values[i]) for key, values in columns.items()} for i, name in enumerate(names)}
    return {"classes": classes, "confusion": table.astype(int).tolist()}


def regression_metrics(predictions: Floats, targets: Floats) -> dict[str, float]:
    """The numbers of a model that gives scores."""
    return {
        "mse": math.fsum((predictions - targets) ** 2) / len(targets) if len(targets) else math.nan,
        "spearman": spearman(predictions, targets),
    }


def _ranks(values: Floats) -> Floats:
    """From 1; equal values get the mean of the ranks that they take."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def _ratios(part: ConfusionMatrix, whole: ConfusionMatrix) -> Floats:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0)
