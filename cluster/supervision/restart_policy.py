"""Whether to start again after a failure, and when: pure rules over what failed before.

Failures are counted in a row: progress past the last one wipes the slate. What fails twice in the same words at the same step,
and not from outside, will fail a third time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FROM_OUTSIDE = ("killed", "host lost", "network lost", "worker lost", "preempted")
"""Faults that say nothing of the run itself, so they may come twice."""
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Failure:
    """One failed start: its fault, the words that tell it from others, the step that was being made, the newest one saved."""

    fault: str
    words: str
    step: int
    saved: int


@dataclass(frozen=True)
class Decision:
    """What follows: ``again`` after ``wait_s`` seconds, or not; ``words`` say so."""

    again: bool
    words: str
    wait_s: float = 0.0


def in_a_row(past: Sequence[Failure], new: Failure) -> list[Failure]:
    """The failures since there was progress, the new one last."""
    progress = past and (new.step > past[-1].step or new.saved > past[-1].saved)
    return [new] if progress else [*past, new]


def decide(row: Sequence[Failure], allowed: int) -> Decision:
    """What follows the last failure of a ``row``, of which ``allowed`` are answered by a restart."""
    new, tries = row[-1], len(row)
    if new.fault not in FROM_OUTSIDE and row[:-1] and (row[-2].words, row[-2].step) == (new.words, new.step):
        return Decision(
            False, "giving up: it failed twice in the same way at the same step, so a restart does not help"
        )
    if tries > allowed:
        limit = f"giving up: cluster.max_failures={allowed} restarts in a row made no progress" if allowed else ""
        return Decision(False, limit or "giving up: cluster.max_failures=0 allows no restart")
    wait = min(LONGEST_WAIT_S, 2.0 ** (tries - 2)) if tries > 1 else 0.0
    start = (
        f"from the checkpoint of step {new.saved}" if new.saved else "from the beginning: there is no checkpoint yet"
    )
    after = f" in {wait:.0f} s" if wait else ""
    return Decision(True, f"starting again{after} {start} (restart {tries} of {allowed} without progress)", wait)
