"""How far a run has come: all that must be remembered beside weights and moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from train.data.sampling.batch_plan import Cursor
from train.state.loss_history import LossHistory


@dataclass(frozen=True)
class TrainState:
    """The state of a run after ``step`` optimizer steps; everything else is a function of it and the configuration."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    """Where the data goes on: after the batch consumed, not the one prefetched."""
    tokens: int = 0
    """Places trained on so far."""
    updates: int = 0
    """Steps whose update was made; the moments have seen this many."""
    skipped_in_row: int = 0
    """Steps in a row whose update was not made since its gradient was not finite."""
    train_s: float = 0.0
    """Seconds spent in the steps that count, without waiting for their data or for saves."""
    score: float | None = None
    """How good the model of this very step was found to be, the lower the better; see ``train.stability.early_stopping``."""
    best: float | None = None
    """The lowest score so far, and the step that had it."""
    best_step: int = 0
    stale: int = 0
    """Evaluations since then."""
    recent: LossHistory = field(default_factory=LossHistory)
    """What the next steps are judged by."""

    def after(self, cursor: Cursor, tokens: int, applied: bool, seconds: float) -> TrainState:
        """The progress after one more step."""
        return replace(
            self,
            step=self.step + 1,
            cursor=cursor,
            tokens=self.tokens + tokens,
            updates=self.updates + applied,
            skipped_in_row=0 if applied else self.skipped_in_row + (tokens > 0),
            train_s=self.train_s + seconds,
            score=None,
        )

    def measured(self, score: float) -> TrainState:
        """The progress once the model of now has been found to be worth ``score``."""
        if self.best is None or score < self.best:
            return replace(self, score=score, best=score, best_step=self.step, stale=0)
        return replace(self, score=score, stale=self.stale + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """What ``to_dict`` gave."""
        # A checkpoint older than the rule has nothing recent.
        recent = LossHistory.from_dict(values["recent"]) if "recent" in values else LossHistory()
        return cls(**{**values, "cursor": Cursor.from_dict(values["cursor"]), "recent": recent})
