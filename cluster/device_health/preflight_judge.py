"""Which devices failed or lag in the measurements before training; pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SLOW_SHARE = 0.85
"""A device that computes at less than this share of the median of its kind is slow."""
FREE_SHARE = 0.8
"""Where less than this share of a GPU's memory is free before training, something else holds it."""


@dataclass(frozen=True)
class Measurement:
    """One rank's device before training."""

    rank: int
    host: str
    gpu: str = ""
    """The number or UUID of the GPU; empty on a CPU."""
    kind: str = ""
    """The GPU's name: only devices of one kind are compared."""
    products: int = 0
    """Matrix products that were checked."""
    wrong_products: int = 0
    wrong_words: int = 0
    """Words of memory that did not hold what was written."""
    tflops: float = 0.0
    free_mib: int = 0
    memory_mib: int = 0

    @property
    def place(self) -> str:
        """The device for people: "rank 3 on node2 GPU 5"."""
        return f"rank {self.rank} on {self.host}" + (f" GPU {self.gpu}" if self.gpu else "")

    def to_json(self) -> dict[str, Any]:
        """The measurement as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """Ranks that must not train, each with the reason, and notes on devices that may."""

    failed: Mapping[int, str]
    notes: tuple[str, ...] = ()


def judge(measurements: Sequence[Measurement]) -> Judgement:
    """Judges all ranks' devices: those that err by themselves, those that are slow by the median of their kind."""
    failed, notes = {}, []
    rates: dict[str, list[float]] = {}
    for one in measurements:
        rates.setdefault(one.kind, []).append(one.tflops)
    for one in measurements:
        if one.wrong_products:
            failed[one.rank] = f"{one.wrong_products} of {one.products} matrix products were wrong"
        elif one.wrong_words:
            failed[one.rank] = f"{one.wrong_words:,} words of its memory did not hold what was written"
        usual = statistics.median(rates[one.kind])
        if one.tflops < SLOW_SHARE * usual:
            notes.append(f"{one.place} is slow: {one.tflops:,.3g} TFLOP/s, where {usual:,.3g} is the median")
        if one.free_mib < FREE_SHARE * one.memory_mib:
            held = one.memory_mib - one.free_mib
            notes.append(f"{one.place}: {held:,} of {one.memory_mib:,} MiB of its memory are held by something else")
    return Judgement(failed, tuple(notes))
