"""Early stopping: ``stop.metric`` has not improved for ``stop.patience`` evaluations in a row."""

from __future__ import annotations

import math
from typing import Any

from train.config.schema import StopConfig
from train.errors import UserError
from train.state.train_state import TrainState
from train.util.format import plural


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric are better: losses, errors and bits per byte."""
    return metric.endswith("loss") or metric in ("bits_per_byte", "mse")


def update(stop: StopConfig, state: TrainState, evaluated: dict[str, Any]) -> TrainState:
    """The state with the score of an evaluation whose metrics are ``evaluated``; unchanged where nothing was held out.

    Raises UserError where ``stop.metric`` is not among them. A value that is not finite is never the best.
    """
    if not evaluated:
        return state
    if stop.metric not in evaluated:
        raise UserError(f"stop.metric={stop.metric} is not measured here. There are: {', '.join(evaluated)}")
    value = evaluated[stop.metric]
    if value is None or not math.isfinite(value):
        return state.with_score(None)
    return state.with_score(float(value) if lower_is_better(stop.metric) else -float(value))


def should_stop(stop: StopConfig, state: TrainState) -> bool:
    """Whether the run ends early: ``stop.patience`` evaluations have brought nothing better (0: never)."""
    return 0 < stop.patience <= state.evals_since_best


def reason(stop: StopConfig, state: TrainState) -> str:
    """The line that tells the user why the run ends early."""
    best = abs(state.best or 0.0)
    return (
        f"step {state.step}: enough: {stop.metric} was best at step {state.best_step} ({best:.4f}), "
        f"{plural(state.evals_since_best, 'evaluation')} ago (stop.patience={stop.patience})"
    )
