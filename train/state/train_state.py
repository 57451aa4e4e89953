"""The state of a run beside weights and moments: data position, counts, best score."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from train.data.sampling.batch_plan import Cursor
from train.state.loss_history import LossHistory

KEYS = {"history": "recent", "evals_since_best": "stale"}
"""Keys of checkpoints that differ from the names of the fields."""


@dataclass(frozen=True)
class TrainState:
    """The state of a run after ``step`` optimizer steps; everything else is a function of it and the configuration."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    """Where the data goes on: after the batch consumed, not the one prefetched."""
    tokens: int = 0
    """Tokens of the global batches so far."""
    updates: int = 0
    """Steps whose update was made; the moments have seen this many."""
    skipped_in_row: int = 0
    """Steps in a row, up to this one, whose update was skipped since its gradient was not finite."""
    train_s: float = 0.0
    """Seconds spent in the steps that count, without waiting for their data or for saves."""
    score: float | None = None
    """Of the model of this very step by ``stop.metric``, lower is better: see ``train.stability.early_stopping``. None:
    not evaluated.
    """
    best: float | None = None
    """The lowest score so far."""
    best_step: int = 0
    """The step that had it."""
    evals_since_best: int = 0
    """Evaluations since ``best_step``."""
    history: LossHistory = field(default_factory=LossHistory)
    """Losses that those of the next steps are compared with."""

    def after(self, cursor: Cursor, tokens: int, applied: bool, seconds: float) -> TrainState:
        """The state after a step of ``tokens`` whose data end at ``cursor``; ``applied``: its update was made."""
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

    def with_score(self, score: float | None) -> TrainState:
        """The state once the model of this step is known to have ``score``; None, which is never the best: a number
        that is not finite.
        """
        if score is not None and (self.best is None or score < self.best):
            return replace(self, score=score, best=score, best_step=self.step, evals_since_best=0)
        return replace(self, score=score, evals_since_best=self.evals_since_best + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's manifest."""
        return {KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The state that ``to_dict`` was called on."""
        names = {key: name for name, key in KEYS.items()}
        fields = {names.get(key, key): value for key, value in values.items()}
        fields["cursor"] = Cursor.from_dict(fields["cursor"])
        if "history" in fields:  # older checkpoints have none
            fields["history"] = LossHistory.from_dict(fields["history"])
        return cls(**fields)
