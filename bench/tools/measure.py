"""Times functions on one device, in turns, and measures the peak rates of the device itself.

On a GPU a time is between two events on the device's queue. The L2 cache is flushed before each, and the host runs so
far ahead that the device never waits for it; the host's own time is reported separately. On a CPU a time is the wall
clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from train.reporting.throughput import matmul_rate

FLUSH_BYTES = 256 << 20
"""Larger than any L2 cache."""
AHEAD_CYCLES = 1_000_000
"""Clock cycles, some 0.6 ms, that the device waits so that the host can start a function in the meantime."""
MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 5, 25, 3

Thunk = Callable[[], object]


@dataclass
class Times:
    """Times of one function, a number per round: milliseconds on the device, and of the host to start it."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median milliseconds on the device."""
        return statistics.median(self.device)


def time_in_turns(
    thunks: dict[str, Thunk], device: torch.device, seconds: float
) -> tuple[dict[str, Times], dict[str, str]]:
    """(times by name, error message by name of the functions that failed), measured for about ``seconds`` seconds.

    Every function runs once a round; odd rounds go in reverse order.
    """
    failed, round_s = {}, 0.0
    for name, thunk in thunks.items():
        try:
            round_s += _warm_up(thunk, device)
        except Exception as error:  # a peer that does not support these shapes, or runs out of memory
            lines = str(error).strip().splitlines()
            failed[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
    running = {name: thunk for name, thunk in thunks.items() if name not in failed}
    times = {name: Times() for name in running}
    time_round = _on_cuda if device.type == "cuda" else _on_cpu
    for round_number in range(max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(round_s, 1e-6))))):
        names = list(running)[:: -1 if round_number % 2 else 1]
        for name, (on_device, on_host) in zip(names, time_round([running[name] for name in names]), strict=True):
            times[name].device.append(on_device)
            times[name].host.append(on_host)
    return times, failed


def _warm_up(thunk: Thunk, device: torch.device) -> float:
    """Seconds of a call after warm-up, when everything is compiled and allocated."""
    for _ in range(WARM_UP):
        start_time = time.perf_counter()
        thunk()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start_time


def _on_cpu(thunks: list[Thunk]) -> list[tuple[float, float]]:
    """One round: the wall-clock milliseconds of each function, as both numbers."""
    times = []
    for thunk in thunks:
        start_time = time.perf_counter()
        thunk()
        elapsed_ms = 1e3 * (time.perf_counter() - start_time)
        times.append((elapsed_ms, elapsed_ms))
    return times


def _on_cuda(thunks: list[Thunk]) -> list[tuple[float, float]]:
    """One round: (milliseconds on the device, milliseconds of the host) of each function."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for thunk in thunks:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        start_time = time.perf_counter()
        thunk()
        elapsed_ms = time.perf_counter() - start_time
        end.record()
        times.append((start, end, 1e3 * elapsed_ms))
    torch.cuda.synchronize()
    return [(start.elapsed_time(end), elapsed_ms) for start, end, elapsed_ms in times]


@dataclass(frozen=True)
class Roofline:
    """Peak rates measured in this run: FLOP/s of matrix products in ``dtype``, bytes/s of a copy."""

    dtype: torch.dtype
    flops: float
    bytes: float

    def of(self, unit: str) -> float:
        """The peak rate for work in ``unit``, FLOP or B."""
        return self.flops if unit == "FLOP" else self.bytes


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measures the peak rates in some tenths of a second; a byte that is read and written counts twice."""
    elements = (1 << 30 if device.type == "cuda" else 64 << 20) // 2
    source = torch.empty(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times, _ = time_in_turns({"copy": lambda: target.copy_(source)}, device, 0.2)
    return Roofline(dtype, matmul_rate(device, dtype, 0.3), 2 * 2 * elements / times["copy"].median * 1e3)
