"""From the pulses of ranks that run to what is wrong with them: hung, and by whose fault, or slow. Pure.

Ranks work in step, so when one stands still the others soon wait for it, in the next collective. A world hangs when none of its
ranks moves: not to another phase, micro-batch or collective. Whose fault it is shows in how many collectives each has begun.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.supervision.outcome import Diagnosis, Heartbeat

FIRST = 5
"""How many times the hang timeout a phase may take that the rank has not yet been through: compiling, filling caches."""
KNOWN = 2
"""How many times the longest that it took so far."""
SLOW = 1.3
"""A rank that works so many times as long as the others holds them up."""
LEAST_S = 0.005
"""Seconds a step below which a rank is not called slow: the machine's own unrest."""
WINDOW_STEPS, WINDOW_S, WINDOWS = 6, 2.0, 3
"""A rank is slow when it was in so many windows in a row, each of at least so many steps and seconds."""


@dataclass(frozen=True)
class HangLimits:
    """Seconds: how long a rank may stand still, and how long a start may take."""

    hang_s: float
    start_s: float

    def of(self, beat: Heartbeat) -> float:
        """How long this rank may stand still where it is now."""
        if beat.longest_s > 0:
            return max(self.hang_s, KNOWN * beat.longest_s)
        return max(FIRST * self.hang_s, self.start_s if beat.phase == "start" else 0.0)


def diagnose_hang(beats: Sequence[Heartbeat], limits: HangLimits) -> Diagnosis | None:
    """What keeps the ranks that live from going on, or None while any of them moves or may still take its time."""
    stopped = [b for b in beats if b.stopped and b.still_s > limits.hang_s]
    if not stopped and not (beats and all(b.still_s > limits.of(b) for b in beats)):
        return None
    culprits = stopped or _culprits(beats)
    if not culprits:
        still = min(b.still_s for b in beats)
        return Diagnosis(
            "hung", None, f"no rank has moved for {still:.0f} s, and none can be blamed: {_waiting(beats)}"
        )
    first = culprits[0]
    words = [f"hung: nothing moved for {first.still_s:.0f} s {first.where}"]
    if first.inside:
        words.append(f"it is in {first.collective} #{first.count}")
    if first.stopped:
        words.append("it is stopped by a signal (SIGSTOP, or a debugger)")
    others = [b for b in beats if b not in culprits]
    if others:
        words.append(_waiting(others))
    if len(culprits) > 1:
        words.append(f"{format_ranks(culprits[1:])} likewise")
    return Diagnosis("hung", first.rank, words[0], tuple(words[1:]))


def _culprits(beats: Sequence[Heartbeat]) -> list[Heartbeat]:
    """The ranks that the others wait for: those that have begun fewer collectives; else those that are in none; else those that
    are in another than most.
    """
    fewest = min(b.count for b in beats)
    usual, many = Counter(b.collective for b in beats).most_common(1)[0]
    behind, outside = [b for b in beats if b.count == fewest], [b for b in beats if not b.inside]
    astray = [b for b in beats if b.collective != usual] if many > len(beats) / 2 else []
    for suspects in (behind, outside, astray):
        if 0 < len(suspects) < len(beats):
            return suspects
    return list(beats) if len(beats) == 1 else []


def _waiting(beats: Sequence[Heartbeat]) -> str:
    """Where these ranks are, those of one place together."""
    places: dict[tuple[str, str, str], list[Heartbeat]] = {}
    for beat in sorted(beats, key=lambda b: b.rank):
        inside = ("waits", "wait", f"in {beat.collective} #{beat.count}")
        places.setdefault(inside if beat.inside else ("is", "are", beat.where), []).append(beat)
    return "; ".join(
        f"{format_ranks(who)} {one if len(who) == 1 else many} {place}" for (one, many, place), who in places.items()
    )


def format_ranks(beats: Sequence[Any], most: int = 8) -> str:
    """ "rank 1", "ranks 0, 2, 3, ..." """
    numbers = ", ".join(str(b.rank) for b in beats[:most]) + (", ..." if len(beats) > most else "")
    return f"rank{'s' if len(beats) > 1 else ''} {numbers}"


@dataclass
class StragglerDetector:
    """Finds ranks that are slower than the others, window after window. What they wait for each other is not counted."""

    begun: dict[int, Heartbeat] = field(default_factory=dict)
    since: float = 0.0
    streak: dict[int, int] = field(default_factory=dict)

    def look(self, beats: Sequence[Heartbeat], now: float) -> list[tuple[int, float]]:
        """(rank, how many times as long as the median of the others it works) of each rank that is found slow now.

        ``now``: seconds on any clock.
        """
        if {b.rank for b in beats} != self.begun.keys():
            self.begun, self.since, self.streak = {b.rank: b for b in beats}, now, {}
        steps = min((b.step - self.begun[b.rank].step for b in beats), default=0)
        if len(beats) < 2 or steps < WINDOW_STEPS or now < self.since + WINDOW_S:
            return []
        work = {b.rank: (b.busy_s - self.begun[b.rank].busy_s) / (b.step - self.begun[b.rank].step) for b in beats}
        self.begun, self.since = {b.rank: b for b in beats}, now
        found = []
        for rank, mine in work.items():
            others = statistics.median(seconds for other, seconds in work.items() if other != rank)
            slow = mine > SLOW * others and mine > others + LEAST_S
            self.streak[rank] = self.streak.get(rank, 0) + 1 if slow else 0
            if self.streak[rank] == WINDOWS:
                found.append((rank, mine / max(others, 1e-9)))
        return found
