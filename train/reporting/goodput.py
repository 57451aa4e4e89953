"""Goodput: the wall time of a run by cause, over all its starts; causes sum to the wall time.

train   forward, backward and update of the steps that were kept: its share of the wall time is the goodput
redo    the same of steps made again after a rollback or a restart, and the rollback itself
start   from the command to the first step
data    waiting for the batch of every rank
save    waiting for checkpoints
eval    held-out loss and samples
down    between two starts, from the last time that the first is known to have run
other   the rest
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

CAUSES = ("train", "redo", "start", "data", "save", "eval", "down", "other")
Seconds = dict[str, float]


class TimeByCause:
    """A stopwatch whose every lap is charged to a cause. Rank 0's is the run's."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives seconds since 1970, comparable between starts; it may be set back at any time."""
        self.clock = clock
        self.spent: Seconds = dict.fromkeys(CAUSES, 0.0)
        self.began = self.last = clock()

    def lap(self, cause: str, **within: float) -> float:
        """Charge the seconds since the last lap to ``cause``, minus those of other causes ``within`` it; returns what
        it was charged.
        """
        now = self.clock()
        seconds = max(0.0, now - self.last)
        for other, part in within.items():
            part = min(part, seconds)
            self.spent[other] += part
            seconds -= part
        self.spent[cause] += seconds
        self.last = now
        return seconds

    def add_earlier_starts(self, spent: Mapping[str, float], seen: float | None, command: float | None) -> None:
        """Add what earlier starts spent until ``seen``; ``command`` is the time of this start's command, if known.

        The time between the two is "down". Without a command after ``seen``, as in a restart within a job, this start
        began when this stopwatch did.
        """
        began = self.began
        if command is not None and (seen is None or command > seen):
            began = min(began, command)
            self.spent["start"] += self.began - began
        if seen is not None:
            self.spent["down"] += max(0.0, began - seen)
        for cause in self.spent.keys() & spent.keys():
            self.spent[cause] += spent[cause]

    def by_cause(self, kept: float) -> Seconds:
        """Seconds by cause, given the seconds of the steps that were ``kept``: the rest of "train" becomes "redo"."""
        redo = max(0.0, self.spent["train"] - kept)
        return self.spent | {"train": self.spent["train"] - redo, "redo": self.spent["redo"] + redo}


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of the wall time spent on training steps that were kept."""
    return seconds["train"] / max(sum(seconds.values()), 1e-9)
