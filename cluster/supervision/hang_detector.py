"""Finds hung and slow ranks from their heartbeats; pure.

Ranks work in step, so when one stands still the others soon wait for it, in the next collective. An attempt hangs when
none of its ranks moves: not to another phase, micro-batch or collective. Whose fault it is shows in how many
collectives each has begun.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.device_health.device_fault import DeviceFault
from cluster.device_health.flight_record import StuckCollective
from cluster.device_health.slow_clocks import medians_of_others
from cluster.supervision.outcome import Diagnosis, Heartbeat

FIRST_TIME_FACTOR = 5
"""Multiple of the hang timeout that a phase may take the first time: it compiles, and fills caches."""
REPEAT_FACTOR = 2
"""Multiple of the longest time that a phase has taken so far, which it may take again."""
SLOW_RATIO = 1.3
"""A rank whose step takes so many times the others' median is slow."""
MIN_EXCESS_S = 0.005
"""Seconds a step beyond the others' median below which a rank is not slow: that is noise of the machine."""
WINDOW_STEPS, WINDOW_S, WINDOWS = 6, 2.0, 3
"""A rank is reported when it was slow in ``WINDOWS`` windows in a row, each of at least so many steps and seconds."""


@dataclass(frozen=True)
class HangLimits:
    """How long a rank may stand still and how long a start may take, in seconds."""

    hang_s: float
    start_s: float

    def limit_of(self, heartbeat: Heartbeat) -> float:
        """How long this rank may stand still in its present phase, in seconds."""
        if heartbeat.longest_s > 0:
            return max(self.hang_s, REPEAT_FACTOR * heartbeat.longest_s)
        return max(FIRST_TIME_FACTOR * self.hang_s, self.start_s if heartbeat.phase == "start" else 0.0)


def diagnose_hang(heartbeats: Sequence[Heartbeat], limits: HangLimits) -> Diagnosis | None:
    """Why the living ranks hang, and which is to blame; None while any of them moves or is within its limit."""
    stopped = [b for b in heartbeats if b.stopped and b.still_s > limits.hang_s]
    if not stopped and not (heartbeats and all(b.still_s > limits.limit_of(b) for b in heartbeats)):
        return None
    culprits = stopped or _culprits(heartbeats)
    if not culprits:
        still = min(b.still_s for b in heartbeats)
        return Diagnosis(
            "hung", None, f"no rank has moved for {still:.0f} s, and none can be blamed: {_waiting(heartbeats)}"
        )
    first = culprits[0]
    details = [f"hung: nothing moved for {first.still_s:.0f} s {first.where}"]
    if first.inside:
        details.append(f"it is in {first.collective} #{first.count}")
    if first.stopped:
        details.append("it is stopped by a signal (SIGSTOP, or a debugger)")
    others = [b for b in heartbeats if b not in culprits]
    if others:
        details.append(_waiting(others))
    if len(culprits) > 1:
        details.append(f"{format_ranks(culprits[1:])} likewise")
    return Diagnosis("hung", first.rank, details[0], tuple(details[1:]))


def refine_diagnosis(
    diagnosis: Diagnosis,
    heartbeats: Sequence[Heartbeat],
    stuck: StuckCollective | None,
    faults: Mapping[int, DeviceFault],
) -> Diagnosis:
    """The diagnosis of a hang with what the ranks were found to wait for.

    ``stuck``: the collective that does not end. ``faults``: the ranks whose devices report a fault, which outweighs all
    else. A rank that the heartbeats could not blame may be blamed for a collective: on a GPU the ranks run ahead of it.
    """
    by_rank = {b.rank: b for b in heartbeats}
    evidence = diagnosis.evidence if stuck is None else (*diagnosis.evidence, stuck.text)
    if faults:
        rank = min(faults)
        place = f" {by_rank[rank].where}" if rank in by_rank else ""
        description = f"hung{place}: its device has failed: {faults[rank].reason}"
        return replace(
            diagnosis, fault="device", rank=rank, description=description, evidence=evidence, device=faults[rank]
        )
    blamed = next((rank for rank in stuck.culprits if rank in by_rank), None) if stuck is not None else None
    if diagnosis.rank is None and blamed is not None:
        heartbeat = by_rank[blamed]
        description = f"hung: nothing moved for {heartbeat.still_s:.0f} s {heartbeat.where}"
        return replace(diagnosis, rank=blamed, description=description, evidence=evidence)
    return replace(diagnosis, evidence=evidence)


def _culprits(heartbeats: Sequence[Heartbeat]) -> list[Heartbeat]:
    """The ranks that the others wait for; none where they cannot be told.

    These are the ranks that have begun fewer collectives than the others; else those that are in none; else those that
    are in another than most.
    """
    fewest = min(b.count for b in heartbeats)
    usual, many = Counter(b.collective for b in heartbeats).most_common(1)[0]
    behind = [b for b in heartbeats if b.count == fewest]
    outside = [b for b in heartbeats if not b.inside]
    astray = [b for b in heartbeats if b.collective != usual] if many > len(heartbeats) / 2 else []
    for suspects in (behind, outside, astray):
        if 0 < len(suspects) < len(heartbeats):
            return suspects
    return list(heartbeats) if len(heartbeats) == 1 else []


def _waiting(heartbeats: Sequence[Heartbeat]) -> str:
    """Where these ranks are, for people; ranks in the same phase or collective are named together."""
    groups: dict[tuple[str, str, str], list[Heartbeat]] = {}
    for heartbeat in sorted(heartbeats, key=lambda b: b.rank):
        inside = ("waits", "wait", f"in {heartbeat.collective} #{heartbeat.count}")
        groups.setdefault(inside if heartbeat.inside else ("is", "are", heartbeat.where), []).append(heartbeat)
    return "; ".join(
        f"{format_ranks(who)} {one if len(who) == 1 else many} {where}" for (one, many, where), who in groups.items()
    )


def format_ranks(heartbeats: Sequence[Any], most: int = 8) -> str:
    """The ranks' numbers for people: "rank 1", or "ranks 0, 2, 3, ..." with at most ``most`` of them."""
    numbers = ", ".join(str(b.rank) for b in heartbeats[:most]) + (", ..." if len(heartbeats) > most else "")
    return f"rank{'s' if len(heartbeats) > 1 else ''} {numbers}"


def format_ranges(numbers: Sequence[int]) -> str:
    """All of these ranks in words, however many: "ranks 0-3, 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def summarise_steps(step_s: Mapping[int, float]) -> dict[str, float]:
    """The seconds of a step over all ranks, as a line of ``ranks.jsonl`` has them."""
    seconds = [*step_s.values()]
    slowest = max(step_s, key=lambda rank: step_s[rank])
    return {
        "rank_step_s_min": min(seconds),
        "rank_step_s_median": statistics.median(seconds),
        "rank_step_s_max": max(seconds),
        "slowest_rank": slowest,
    }


@dataclass
class StragglerDetector:
    """Finds ranks that are slower than the others, window by window; waits for each other are not counted."""

    window_start: dict[int, Heartbeat] = field(default_factory=dict)
    since: float = 0.0
    """When the window began, on the caller's clock."""
    streak: dict[int, int] = field(default_factory=dict)
    """Windows in a row in which each rank was slow."""
    step_s: dict[int, float] = field(default_factory=dict)
    """Seconds that each rank worked on a step in the last whole window."""

    def find_slow(self, heartbeats: Sequence[Heartbeat], now: float) -> list[tuple[int, float]]:
        """Ranks that are found slow now, each with the ratio of its step time to the median of the others.

        ``now``: seconds on any clock.
        """
        if {b.rank for b in heartbeats} != self.window_start.keys():
            self.window_start, self.since, self.streak = {b.rank: b for b in heartbeats}, now, {}
        steps = min((b.step - self.window_start[b.rank].step for b in heartbeats), default=0)
        if len(heartbeats) < 2 or steps < WINDOW_STEPS or now < self.since + WINDOW_S:
            return []
        work = {
            b.rank: (b.busy_s - self.window_start[b.rank].busy_s) / (b.step - self.window_start[b.rank].step)
            for b in heartbeats
        }
        self.window_start, self.since, self.step_s = {b.rank: b for b in heartbeats}, now, work
        slow_ranks, medians = [], medians_of_others(work)
        for rank, mine in work.items():
            others = medians[rank]
            slow = mine > SLOW_RATIO * others and mine > others + MIN_EXCESS_S
            self.streak[rank] = self.streak.get(rank, 0) + 1 if slow else 0
            if self.streak[rank] == WINDOWS:
                slow_ranks.append((rank, mine / max(others, 1e-9)))
        return slow_ranks
