"""When a run has had enough: its metric has not become better for ``stop.patience`` evaluations in a row."""

from __future__ import annotations

import math
from typing import Any

from train.config.schema import StopConfig
from train.errors import UserError
from train.state.train_state import TrainState
from train.util.format import plural


def lower_is_better(metric: str) -> bool:
    """Whether a metric is the better the lower it is."""
    return metric.endswith("loss") or metric in ("bits_per_byte", "mse")


def update(stop: StopConfig, progress: TrainState, evaluated: dict[str, Any]) -> TrainState:
    """The progress after an evaluation that found ``evaluated``; as it was where nothing was held out.

    Raises UserError where ``stop.metric`` is not among it. What is not a number is worse than any.
    """
    if not evaluated:
        return progress
    if stop.metric not in evaluated:
        raise UserError(f"stop.metric={stop.metric} is not measured here. There are: {', '.join(evaluated)}")
    value = evaluated[stop.metric]
    score = math.inf if value is None or not math.isfinite(value) else float(value)
    return progress.measured(score if lower_is_better(stop.metric) or score == math.inf else -score)


def should_stop(stop: StopConfig, progress: TrainState) -> bool:
    """Whether the run ends here."""
    return 0 < stop.patience <= progress.stale


def reason(stop: StopConfig, progress: TrainState) -> str:
    """Why it does."""
    best = abs(progress.best or 0.0)
    return (
        f"step {progress.step}: enough: {stop.metric} was best at step {progress.best_step} ({best:.4f}), "
        f"{plural(progress.stale, 'evaluation')} ago (stop.patience={stop.patience})"
    )
