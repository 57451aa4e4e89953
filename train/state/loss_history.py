"""Whether a step may be kept: pure rules over its loss, its gradient, and the losses of the steps before it.

A loss is *high* when it lies far above those of the last ``window`` steps: median + ``deviations`` standard deviations, both
robust, so that a few odd steps move neither. High alone is only a suspicion, since hard text is high too. A *spike* is damage: a
step that was not high, the reference, has become so under the weights of now. ``train.stability.guard`` looks at that.

What the rule remembers is part of the progress that a checkpoint saves, so a resumed run judges as if it had never stopped.
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
"""Median absolute deviation to standard deviation, for normal noise."""
LEAST_RISE = 0.1
"""Nats: a smaller rise is none, however quiet the losses before it were."""

Trouble = Literal["non-finite", "spike"]


@dataclass(frozen=True)
class LossHistory:
    """What the rule knows of the steps before."""

    losses: tuple[float, ...] = ()
    reference: Cursor | None = None
    """Where the newest step whose loss was not high stands in the data."""

    def limit(self, spikes: SpikesConfig) -> float:
        """The highest loss that is not high; infinite until the window is full, and where spikes are not watched."""
        if spikes.watch != "all" or len(self.losses) < spikes.window:
            return math.inf
        return outlier_limit(self.losses, spikes.deviations)

    def after(self, loss: float, cursor: Cursor, spikes: SpikesConfig) -> LossHistory:
        """With one more step, whose data begin at ``cursor``. A loss that is not finite leaves no trace."""
        if not math.isfinite(loss):
            return self
        high = loss > self.limit(spikes)
        return LossHistory((*self.losses, loss)[-spikes.window :], self.reference if high else cursor)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LossHistory:
        """What a checkpoint keeps of it."""
        reference = values["reference"]
        return LossHistory(tuple(values["losses"]), reference and Cursor.from_dict(reference))


def outlier_limit(losses: Sequence[float], deviations: float) -> float:
    """median + ``deviations`` robust standard deviations of finite ``losses``, and at least LEAST_RISE above the median."""
    middle = statistics.median(losses)
    spread = NORMAL * statistics.median([abs(loss - middle) for loss in losses])
    return middle + max(deviations * spread, LEAST_RISE)


def diagnose_step(loss: float, applied: bool, limit: float) -> Trouble | None:
    """What is wrong with a step, by its loss and whether its gradient was finite and so its update made."""
    if not applied or not math.isfinite(loss):
        return "non-finite"
    return "spike" if loss > limit else None


def row_limit(losses: Sequence[float], deviations: float) -> float:
    """Above it a row stands out among ``losses``, those of rows under good weights. Where any is not finite, only such rows do."""
    return outlier_limit(losses, deviations) if all(map(math.isfinite, losses)) else math.inf


def is_outlier(loss: float, limit: float) -> bool:
    """Whether a row of this loss is to blame."""
    return not math.isfinite(loss) or loss > limit
