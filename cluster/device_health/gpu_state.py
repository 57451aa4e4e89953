"""The counters of one GPU at one moment, and how they changed while a worker used it; pure.

A counter that the GPU or its driver does not have is None, and is left out of every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.device_health.kernel_log import Pci, parse_pci

THROTTLE_REASONS = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x020: "heat (software)",
    0x040: "heat (hardware)",
    0x080: "power brake of the host",
}
"""Bits of NVML's reasons for a clock below the highest, of those that slow a GPU down at work."""


@dataclass(frozen=True)
class GpuState:
    """One GPU's identity and counters, as NVML gives them."""

    uuid: str = ""
    name: str = ""
    bus: str = ""
    """Its PCI address."""
    ecc_corrected: int | None = None
    """Single-bit errors since the driver was loaded."""
    ecc_uncorrected: int | None = None
    """Double-bit errors since the driver was loaded."""
    ecc_uncorrected_ever: int | None = None
    rows_remapped: int | None = None
    """Memory rows that were replaced for uncorrectable errors."""
    remap_pending: bool | None = None
    """Another row is to be replaced at the next reset."""
    remap_failed: bool | None = None
    pages_retired: int | None = None
    """Before Ampere: pages of memory that are no longer used."""
    throttle: int | None = None
    """NVML's bit mask of reasons for a lower clock."""
    sm_mhz: int | None = None
    sm_max_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    memory_used_mib: int | None = None
    memory_mib: int | None = None

    @property
    def pci(self) -> Pci | None:
        """Its PCI address in the form that the kernel log's are compared with."""
        return parse_pci(self.bus)

    def to_json(self) -> dict[str, Any]:
        """The values that are known, by field."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


def throttle_words(mask: int | None) -> str:
    """The reasons that slow a GPU down, in words; empty where there is none."""
    return ", ".join(words for bit, words in THROTTLE_REASONS.items() if (mask or 0) & bit)


def describe_speed(state: GpuState) -> str:
    """Clock, temperature, power and what holds it back: "1,980 of 1,980 MHz, 61 C, 640 of 700 W"."""
    parts = [
        _of(state.sm_mhz, state.sm_max_mhz, "MHz"),
        f"{state.temperature_c} C" if state.temperature_c is not None else "",
        _of(state.power_w, state.power_limit_w, "W"),
        f"slowed down by {throttle_words(state.throttle)}" if throttle_words(state.throttle) else "",
    ]
    return ", ".join(part for part in parts if part)


def describe_memory(state: GpuState) -> str:
    """Use of its memory: "71,203 of 81,559 MiB used"."""
    used = _of(state.memory_used_mib, state.memory_mib, "MiB")
    return f"{used} of its memory used" if used else ""


def describe_errors(before: GpuState | None, after: GpuState) -> str:
    """Its counters of memory errors, with what the worker's time added: "2 uncorrectable ECC errors (+2)"."""
    counters: Sequence[tuple[str, str]] = (
        ("ecc_uncorrected", "uncorrectable ECC errors"),
        ("ecc_corrected", "corrected ones"),
        ("ecc_uncorrected_ever", "uncorrectable ones ever"),
        ("rows_remapped", "memory rows remapped"),
        ("pages_retired", "pages retired"),
    )
    parts = []
    for field, words in counters:
        count, old = getattr(after, field), getattr(before, field, None)
        if count is not None:
            more = f" (+{count - old} since the worker began)" if old is not None and count > old else ""
            parts.append(f"{count:,} {words}{more}")
    if after.remap_failed:
        parts.append("a row could not be remapped")
    elif after.remap_pending:
        parts.append("a row is to be remapped at the next reset")
    return ", ".join(parts)


def uncorrected_since(before: GpuState | None, after: GpuState | None) -> int:
    """Uncorrectable ECC errors that came while the worker used the GPU; 0 where the counters are not known."""
    if before is None or after is None or before.ecc_uncorrected is None or after.ecc_uncorrected is None:
        return 0
    return max(0, after.ecc_uncorrected - before.ecc_uncorrected)


def _of(value: float | None, most: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if most is None else f"{value:,.0f} of {most:,.0f} {unit}"
