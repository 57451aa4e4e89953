"""Watches a world while it runs: gathers the ranks' pulses, and where they show that it cannot go on, the evidence."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import ray

from cluster.supervision import hang_detector, outcome
from cluster.supervision.job import Job
from train.events import NoteEvent

INSPECT_S = 3.0
OWN_PAUSE_S = 3.0
"""Between two looks: where the driver itself was stopped for so long, nobody else is called silent."""
MOST_RANKS = 6
"""Whose stacks are shown in short where none can be blamed."""


class HealthMonitor:
    """What is known of the ranks of one world while they live."""

    def __init__(self, job: Job, stewards: Sequence[Any], places: Sequence[dict[str, Any]]) -> None:
        cluster = job.config.cluster
        self.job, self.stewards, self.places = job, stewards, places
        self.limits = hang_detector.HangLimits(cluster.hang_timeout, cluster.start_timeout)
        self.stragglers = hang_detector.StragglerDetector()
        self.beats: dict[int, outcome.Heartbeat] = {}
        self.heard: dict[int, float] = {}
        """When each steward last answered (monotonic)."""
        self.looked = 0.0

    def find(self, living: Collection[int]) -> outcome.Diagnosis | None:
        """Why the ranks ``living`` cannot go on, if they cannot: one is cut off, or they hang. Says which are slow."""
        now = time.monotonic()
        if now > self.looked + OWN_PAUSE_S:  # it was us who did not listen
            self.heard = dict.fromkeys(range(len(self.stewards)), now)
        self.looked = now
        silent = [rank for rank in living if now - self.heard[rank] > self.limits.hang_s]
        if silent:
            words = f"was cut off: its host has not answered for {now - self.heard[silent[0]]:.0f} s"
            return outcome.Diagnosis("network lost", silent[0], words)
        known = [self.beats[rank] for rank in living if rank in self.beats]
        found = hang_detector.diagnose_hang(known, self.limits) if len(known) == len(living) else None
        if found is not None:
            return replace(found, evidence=(*found.evidence, *self._inspect(living, found.rank)))
        for rank, ratio in self.stragglers.look(known, now):
            where = f"rank {rank} on {self.places[rank]['host']}"
            self.job.show(NoteEvent(f"{where} is slow: it works {ratio:.1f} times as long as the others").to_json())
        return None

    def _inspect(self, living: Collection[int], culprit: int | None) -> list[str]:
        """The ranks write their stacks to their logs; the culprit's as lines, or, where none can be blamed, some of each."""
        questions = {self.stewards[rank].inspect.remote(): rank for rank in living}
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=INSPECT_S)
        found = {questions[question]: ray.get(question) for question in answered}
        if culprit is None:
            shown = sorted(found.items())[:MOST_RANKS]
            return [line for rank, seen in shown for line in (f"rank {rank}:", *(f"  {f}" for f in seen["stack"][:3]))]
        seen = found.get(culprit, {"kernel": ["not known: its steward did not answer"], "stack": []})
        kernel, stack = [f"kernel: {line}" for line in seen["kernel"]], [f"  {frame}" for frame in seen["stack"]]
        return [*kernel, "", "its stack, innermost first:", *(stack or ["  it could not write it"])]


def beat_of(record: dict[str, Any]) -> outcome.Heartbeat:
    """A steward's record of its trainer's pulse, typed."""
    fields = outcome.Heartbeat.__dataclass_fields__
    return outcome.Heartbeat(**{key: value for key, value in record.items() if key in fields})
