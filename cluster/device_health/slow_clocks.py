"""Finds GPUs that run at a lower clock than the others of their kind at work; pure.

A slow GPU does not show in the seconds that its rank works on the host: the others wait for it within collectives on
their devices. It shows in its clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.device_health.gpu_state import GpuState, throttle_words

SLOW_CLOCK_SHARE = 0.9
"""A GPU below this share of the others' median clock is slow, where the driver says that something holds it back."""
SAMPLES = 2
"""Samples in a row that show it before it is reported, once."""


@dataclass
class SlowClockDetector:
    """Judges samples of all ranks' GPUs, one after the other."""

    streak: dict[int, int] = field(default_factory=dict)
    """Samples in a row in which each rank's GPU was slow."""

    def find_slow(self, states: Mapping[int, GpuState]) -> list[int]:
        """The ranks whose GPUs are found slow now."""
        slow_ranks = []
        for rank, state in states.items():
            kin = [other for number, other in states.items() if number != rank and other.name == state.name]
            clocks = [other.sm_mhz for other in kin if other.sm_mhz is not None]
            slow = (
                state.sm_mhz is not None
                and bool(clocks)
                and state.sm_mhz < SLOW_CLOCK_SHARE * statistics.median(clocks)
                and bool(throttle_words(state.throttle))
            )
            self.streak[rank] = self.streak.get(rank, 0) + 1 if slow else 0
            if self.streak[rank] == SAMPLES:
                slow_ranks.append(rank)
        return slow_ranks
