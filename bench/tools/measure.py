"""Times of functions on one device, taking turns, and what the device itself can do.

On a GPU a time is between two events on the device's queue, with the L2 cache flushed before each and the host so far ahead that
it is never waited for; the host's own time is kept beside it. On a CPU it is the wall clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from train.reporting.throughput import matmul_rate

FLUSH_BYTES = 256 << 20
"""More than any L2 cache holds."""
AHEAD_CYCLES = 1_000_000
"""Of the device's clock, some 0.6 ms: what the host may take to start a function before it is waited for."""
LEAST_ROUNDS, MOST_ROUNDS, WARM_UP = 5, 25, 3

Thunk = Callable[[], object]


@dataclass
class Times:
    """Of one function in every round: milliseconds on the device, and milliseconds that the host took to start it."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.device)


def take_turns(
    thunks: dict[str, Thunk], device: torch.device, seconds: float
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of every function, round by round, odd rounds in the other order, for about so many seconds; and what failed, why."""
    failed, single = {}, 0.0
    for name, thunk in thunks.items():
        try:
            single += _warm_up(thunk, device)
        except Exception as error:  # a peer that is not made for these shapes, or has no room for them
            failed[name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
            )
    left = {name: thunk for name, thunk in thunks.items() if name not in failed}
    times = {name: Times() for name in left}
    clock = _on_cuda if device.type == "cuda" else _on_cpu
    for number in range(max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(single, 1e-6))))):
        names = list(left)[:: -1 if number % 2 else 1]
        for name, (on_device, on_host) in zip(names, clock([left[name] for name in names]), strict=True):
            times[name].device.append(on_device)
            times[name].host.append(on_host)
    return times, failed


def _warm_up(thunk: Thunk, device: torch.device) -> float:
    """Seconds of a call once all is compiled and allocated."""
    for _ in range(WARM_UP):
        began = time.perf_counter()
        thunk()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - began


def _on_cpu(thunks: list[Thunk]) -> list[tuple[float, float]]:
    found = []
    for thunk in thunks:
        began = time.perf_counter()
        thunk()
        taken = 1e3 * (time.perf_counter() - began)
        found.append((taken, taken))
    return found


def _on_cuda(thunks: list[Thunk]) -> list[tuple[float, float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    found = []
    for thunk in thunks:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        began = time.perf_counter()
        thunk()
        taken = time.perf_counter() - began
        end.record()
        found.append((start, end, 1e3 * taken))
    torch.cuda.synchronize()
    return [(start.elapsed_time(end), taken) for start, end, taken in found]


@dataclass(frozen=True)
class Roofline:
    """What this device was measured to do, in this run: FLOP/s of matrix products in ``dtype``, bytes/s of a copy."""

    dtype: torch.dtype
    flops: float
    bytes: float

    def of(self, unit: str) -> float:
        """The rate that work of this unit cannot exceed."""
        return self.flops if unit == "FLOP" else self.bytes


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measured for some tenths of a second; a byte that is read and written counts twice."""
    elements = (1 << 30 if device.type == "cuda" else 64 << 20) // 2
    source = torch.empty(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times, _ = take_turns({"copy": lambda: target.copy_(source)}, device, 0.2)
    return Roofline(dtype, matmul_rate(device, dtype, 0.3), 2 * 2 * elements / times["copy"].median * 1e3)
