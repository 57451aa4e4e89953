"""Spike detection: pure rules over the loss and gradient of a step and the losses before it.

A loss is *high* when it lies far above those of the last ``window`` steps: median + ``deviations`` standard deviations,
both robust, so that a few odd steps move neither. A high loss alone may be hard text. A *spike* is damage to the model:
the loss of the reference, a recent step that was not high, has become high under the current weights;
``train.stability.guard`` measures it.

The history is part of the state in a checkpoint, so a resumed run decides as if it had never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from train.config.schema import SpikesConfig
from train.data.sampling.batch_plan import Cursor

NORMAL = 1.4826
"""Standard deviation over median absolute deviation, for normal noise."""
LEAST_RISE = 0.1
"""Nats above the median below which no loss is high, however small the spread of the others."""

Trouble = Literal["non-finite", "spike"]


@dataclass(frozen=True)
class LossHistory:
    """Losses of the last steps, and the newest step whose loss was not high."""

    losses: tuple[float, ...] = ()
    reference: Cursor | None = None
    """Position in the data of the newest step whose loss was not high."""

    def limit(self, spikes: SpikesConfig) -> float:
        """The loss above which a step is high; infinite until the window is full, and where spikes are not watched."""
        if spikes.watch != "all" or len(self.losses) < spikes.window:
            return math.inf
        return outlier_limit(self.losses, spikes.deviations)

    def after(self, loss: float, cursor: Cursor, spikes: SpikesConfig) -> LossHistory:
        """The history with one more step, whose data begin at ``cursor``; unchanged by a loss that is not finite."""
        if not math.isfinite(loss):
            return self
        high = loss > self.limit(spikes)
        return LossHistory((*self.losses, loss)[-spikes.window :], self.reference if high else cursor)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LossHistory:
        """The history of a checkpoint's plain values."""
        reference = values["reference"]
        return LossHistory(tuple(values["losses"]), reference and Cursor.from_dict(reference))


def outlier_limit(losses: Sequence[float], deviations: float) -> float:
    """median + ``deviations`` robust standard deviations of finite ``losses``, and at least LEAST_RISE above the
    median.
    """
    middle = statistics.median(losses)
    spread = NORMAL * statistics.median([abs(loss - middle) for loss in losses])
    return middle + max(deviations * spread, LEAST_RISE)


def diagnose_step(loss: float, applied: bool, limit: float) -> Trouble | None:
    """Classify a step by its loss and whether its update was ``applied`` (its gradient finite); None if good."""
    if not applied or not math.isfinite(loss):
        return "non-finite"
    return "spike" if loss > limit else None


def row_limit(losses: Sequence[float], deviations: float) -> float:
    """The loss above which a row is an outlier, of rows under good weights. Where any loss is not finite, only such
    rows are.
    """
    return outlier_limit(losses, deviations) if all(map(math.isfinite, losses)) else math.inf


def is_outlier(loss: float, limit: float) -> bool:
    """Whether a row's loss is not finite or above the limit."""
    return not math.isfinite(loss) or loss > limit
