"""Evidence on a rank's GPU from its host, at the failure of the rank; pure but for its collection by the agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.device_health import kernel_log
from cluster.device_health.gpu_state import GpuState, describe_errors, describe_memory, describe_speed

MOST_MESSAGES = 6
"""Messages of the kernel log that are shown at most."""


@dataclass(frozen=True)
class DeviceEvidence:
    """A GPU before and after a worker, and the driver's messages since the worker began."""

    before: GpuState | None = None
    after: GpuState | None = None
    """None where the GPU no longer answers."""
    messages: tuple[str, ...] = ()

    @property
    def errors(self) -> list[kernel_log.DriverError]:
        """The driver's errors that are about this GPU."""
        known = self.after or self.before
        return kernel_log.errors_of(kernel_log.driver_errors(self.messages), known.pci if known else None)

    def to_json(self) -> dict[str, Any]:
        """The evidence as a JSON object, without what is not known."""
        states = {"before": self.before, "after": self.after}
        known = {key: state.to_json() for key, state in states.items() if state is not None}
        return {**known, "messages": list(self.messages)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DeviceEvidence:
        """The evidence that ``to_json`` wrote."""
        before, after = (GpuState(**record[key]) if key in record else None for key in ("before", "after"))
        return cls(before, after, tuple(record.get("messages", ())))


def describe_evidence(evidence: DeviceEvidence) -> list[str]:
    """The evidence in lines for a failure's block; none where nothing is known."""
    after, lines = evidence.after, []
    if after is not None:
        lines.append(" ".join(part for part in (after.name or "GPU", after.uuid, after.bus) if part))
        details = (describe_errors(evidence.before, after), describe_speed(after), describe_memory(after))
        lines += [f"  {detail}" for detail in details if detail]
    elif evidence.before is not None:
        lines.append(f"{evidence.before.name or 'the GPU'} {evidence.before.uuid} no longer answers the driver".strip())
    messages = [error.text for error in evidence.errors]
    if messages:
        more = [f"  ... and {len(messages) - MOST_MESSAGES} more"] if len(messages) > MOST_MESSAGES else []
        lines += ["the kernel log of its host:", *(f"  {text}" for text in messages[:MOST_MESSAGES]), *more]
    return lines
