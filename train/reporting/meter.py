"""Meter of a run: its speed, utilisation and GPU memory, since the last record and since the start.

Seconds are those of the host's clock, which waits for the device at the end of each step anyway: nothing here makes it
wait.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.distributed import process_group
from train.distributed.device import describe
from train.kernel_setup import DTYPES
from train.reporting.throughput import matmul_rate, peak_flops, tokens_per_second, utilization

GIB = 2**30


@dataclass(frozen=True)
class DeviceRates:
    """Measures that the speed of a run is judged by: FLOPs that a token takes, and the rates of each of its devices."""

    flops_per_token: float
    workers: int
    peak: float | None
    """FLOP/s by the data sheet, in the run's precision; None where it is not known."""
    measured: float
    """FLOP/s of matrix products, measured on this device at the start."""

    @classmethod
    def measure(cls, world: process_group.DistContext, flops_per_token: float, precision: str) -> DeviceRates:
        """The rates of this rank's device, which stands for all."""
        peak = peak_flops(describe(world.device).name, precision)
        return cls(flops_per_token, world.size, peak, matmul_rate(world.device, DTYPES[precision]))

    def speed(self, tokens: int, step_seconds: Sequence[float]) -> dict[str, float]:
        """Speed over some steps, by the names that ``metrics.jsonl`` has."""
        speed = tokens_per_second(tokens, sum(step_seconds))
        of_peak = utilization(speed, self.flops_per_token, self.workers, self.peak)
        of_measured = utilization(speed, self.flops_per_token, self.workers, self.measured) or 0.0
        return {
            "tokens_per_s": round(speed, 1),
            "tokens_per_s_per_worker": round(speed / self.workers, 1),
            **({} if of_peak is None else {"mfu": round(of_peak, 4)}),
            "mfu_measured": round(of_measured, 4),
            "step_s_p50": round(percentile(step_seconds, 0.50), 5),
            "step_s_p99": round(percentile(step_seconds, 0.99), 5),
        }


class Meter:
    """Measures one start of a run; rank 0's is the run's."""

    def __init__(self, rates: DeviceRates, device: torch.device) -> None:
        self.rates, self.device = rates, device
        self.tokens, self.step_seconds = 0, array("d")

    def record(self, tokens: int, step_seconds: Sequence[float]) -> dict[str, float]:
        """Numbers of the steps since the last record, which trained on ``tokens``, for a line of ``metrics.jsonl``."""
        self.tokens += tokens
        self.step_seconds.extend(step_seconds)
        return self.rates.speed(tokens, step_seconds) | gpu_memory(self.device)

    def summary(self) -> dict[str, float]:
        """The same of all steps recorded since the start; empty where there are none."""
        return self.rates.speed(self.tokens, self.step_seconds) | gpu_memory(self.device) if self.step_seconds else {}


def percentile(values: Sequence[float], share: float) -> float:
    """The least of ``values`` that ``share`` of them do not exceed (nearest rank); 0 without any."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


def gpu_memory(device: torch.device) -> dict[str, float]:
    """GiB of a GPU that tensors hold now, that torch's allocator has taken, and the most that tensors have held since
    the start; empty for a CPU.
    """
    if device.type != "cuda":
        return {}
    held = {
        "gpu_allocated_gib": torch.cuda.memory_allocated(device),
        "gpu_reserved_gib": torch.cuda.memory_reserved(device),
        "gpu_peak_gib": torch.cuda.max_memory_allocated(device),
    }
    return {name: round(size / GIB, 3) for name, size in held.items()}
