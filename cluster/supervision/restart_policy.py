"""Decides whether and when a failed job starts again, from its failures so far; pure.

Failures are counted in a row: progress past the last one resets the count. A failure of the run itself that comes twice
with the same signature at the same step would come a third time, so there is no restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.supervision.left_places import LeftPlace

FROM_OUTSIDE = ("killed", "host lost", "network lost", "worker lost", "preempted", "device")
"""Faults that say nothing of the run itself, so they may come twice."""
LONGEST_WAIT_S = 60.0
"""Limit of the exponential back-off between restarts."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt of a job."""

    fault: str
    signature: str
    """Text that is equal for failures of the same kind, see ``failure_report.signature``."""
    step: int
    """The furthest step that a rank was at."""
    saved: int
    """Step of the newest checkpoint; 0 without one."""


@dataclass(frozen=True)
class Decision:
    """Whether the job starts again, and after how many seconds; ``message`` says so to the user."""

    again: bool
    message: str
    wait_s: float = 0.0


def in_a_row(past: Sequence[Failure], new: Failure) -> list[Failure]:
    """The failures since there was progress, of which ``new`` is the last."""
    progress = past and (new.step > past[-1].step or new.saved > past[-1].saved)
    return [new] if progress else [*past, new]


def decide(row: Sequence[Failure], allowed: int, left: LeftPlace | None = None, shortage: str = "") -> Decision:
    """The decision after the last failure of ``row``, of which the first ``allowed`` are answered by a restart.

    ``left``: the place that is left for it. ``shortage``: why the job cannot go on without the places it has left.
    """
    new, tries = row[-1], len(row)
    if shortage:
        return Decision(False, shortage)
    if new.fault not in FROM_OUTSIDE and row[:-1] and (row[-2].signature, row[-2].step) == (new.signature, new.step):
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
    without = f" without {left.words}" if left else ""
    count = f"(restart {tries} of {allowed} without progress)"
    return Decision(True, f"starting again{after}{without} {start} {count}", wait)
