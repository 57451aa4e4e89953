"""Metrics of model quality, one formula each, from sums over all ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ConfusionMatrix = NDArray[Any]
"""Counts (C, C): row is the target class, column the predicted class."""


def perplexity(loss: float) -> float:
    """exp(loss), the loss in nats per token; finite for any loss."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits per byte of text, from summed nats: comparable between tokenizers."""
    return nats / math.log(2) / text_bytes


def accuracy(table: ConfusionMatrix) -> float:
    """Share of predictions that are correct; equals micro-averaged precision, recall and F1."""
    return _ratio(np.trace(table), table.sum())


def precision(table: ConfusionMatrix) -> Floats:
    """Per-class precision: TP / (TP + FP); 0 for a class without predictions."""
    return _ratios(np.diagonal(table), table.sum(0))


def recall(table: ConfusionMatrix) -> Floats:
    """Per-class recall: TP / (TP + FN); 0 for a class without targets."""
    return _ratios(np.diagonal(table), table.sum(1))


def f1(table: ConfusionMatrix) -> Floats:
    """Per-class F1: 2 TP / (2 TP + FP + FN); 0 for a class without targets and predictions."""
    return _ratios(2 * np.diagonal(table), table.sum(0) + table.sum(1))


def macro(values: Floats) -> float:
    """Macro average: the unweighted mean over classes."""
    return float(values.mean())


def spearman(predictions: Floats, targets: Floats) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN where all predictions or all targets are equal."""
    a, b = (_ranks(values) - (len(values) + 1) / 2 for values in (predictions, targets))
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread else math.nan


def classification_metrics(table: ConfusionMatrix) -> dict[str, float]:
    """Metrics of a classifier: accuracy, and macro and micro averages."""
    return {
        "accuracy": accuracy(table),
        "precision_macro": macro(precision(table)),
        "recall_macro": macro(recall(table)),
        "f1_macro": macro(f1(table)),
        "f1_micro": accuracy(table),
    }


def per_class_metrics(table: ConfusionMatrix, names: list[str]) -> dict[str, Any]:
    """Precision, recall, F1 and count of each class, and the confusion matrix."""
    columns = {"precision": precision(table), "recall": recall(table), "f1": f1(table), "count": table.sum(1)}
    rows = np.stack(list(columns.values()), axis=1).astype(float).tolist()
    classes = {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=False)}
    return {"classes": classes, "confusion": table.astype(int).tolist()}


def regression_metrics(predictions: Floats, targets: Floats) -> dict[str, float]:
    """Metrics of a model that predicts scores: mean squared error and Spearman's rho."""
    return {
        "mse": math.fsum((predictions - targets) ** 2) / len(targets) if len(targets) else math.nan,
        "spearman": spearman(predictions, targets),
    }


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def _ratios(part: ConfusionMatrix, whole: ConfusionMatrix) -> Floats:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0)
