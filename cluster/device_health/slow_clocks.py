"""Finds GPUs that run at a lower clock than the others of their kind at work; pure.

A slow GPU does not show in the seconds that its rank works on the host: the others wait for it within collectives on
their devices. It shows in its clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.device_health.gpu_state import GpuState, throttle_words

SLOW_CLOCK_SHARE = 0.9
"""A GPU below this share of the others' median clock is slow, where the driver says that something holds it back."""
SAMPLES = 2
"""Samples in a row that show it before it is reported, once."""


def medians_of_others(values: Mapping[int, float]) -> dict[int, float]:
    """The median of the others' values for each key; none where there are no others. Sorts once, whatever the size."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    rest = len(ordered) - 1
    medians = {}
    for place, (key, _) in enumerate(ordered if rest else ()):
        low, high = (rest - 1) // 2, rest // 2  # places among the others, from which this one is taken out
        pair = [ordered[at + (at >= place)][1] for at in (low, high)]
        medians[key] = sum(pair) / 2
    return medians


@dataclass
class SlowClockDetector:
    """Judges samples of all ranks' GPUs, one after the other."""

    streak: dict[int, int] = field(default_factory=dict)
    """Samples in a row in which each rank's GPU was slow."""

    def find_slow(self, states: Mapping[int, GpuState]) -> list[int]:
        """The ranks whose GPUs are found slow now."""
        slow_ranks = []
        clocks: dict[str, dict[int, float]] = {}
        for rank, state in states.items():
            if state.sm_mhz is not None:
                clocks.setdefault(state.name, {})[rank] = state.sm_mhz
        usual: dict[int, float] = {}
        for kin in clocks.values():
            usual |= medians_of_others(kin)
        for rank, state in states.items():
            slow = (
                state.sm_mhz is not None
                and rank in usual
                and state.sm_mhz < SLOW_CLOCK_SHARE * usual[rank]
                and bool(throttle_words(state.throttle))
            )
            self.streak[rank] = self.streak.get(rank, 0) + 1 if slow else 0
            if self.streak[rank] == SAMPLES:
                slow_ranks.append(rank)
        return slow_ranks
