"""Decides whether a rank failed because of its GPU: from its error, the GPU's counters and the kernel log; pure.

A fault of the device asks for the opposite of a fault of the run: another GPU, not another look at the program.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cluster.device_health import gpu_state, kernel_log
from cluster.device_health.evidence import DeviceEvidence

HARDWARE_TEXT = re.compile(
    r"uncorrectable ECC error encountered"
    r"|uncorrectable NVLink error detected during the execution"
    r"|Invalid access of peer GPU memory over nvlink or a hardware error"
    r"|hardware stack error"
    r"|GPU has fallen off the bus|GPU is lost"
    r"|CUDA-capable device\(s\) is/are busy or unavailable"
    r"|no CUDA-capable device is detected"
    r"|system not yet initialized"
)
"""Errors of CUDA, NCCL and NVML that no program causes by what it computes."""
HOST_TEXT = re.compile(r"nvlink|fallen off the bus|GPU is lost|no CUDA-capable|not yet initialized", re.IGNORECASE)
"""Of these the ones that concern what the GPUs of a host share: bus, switch and driver."""
LAUNCH_TEXT = re.compile(r"unspecified launch failure|CUDA error: unknown error|Cuda failure 999 'unknown error'")
"""As a rule the device's; not where the driver reports an error of the program, and none of the device."""
PROGRAM_TEXT = re.compile(
    r"an illegal memory access was encountered|device-side assert triggered|misaligned address"
    r"|an illegal instruction was encountered|CUBLAS_STATUS_EXECUTION_FAILED|CUBLAS_STATUS_INTERNAL_ERROR"
    r"|CUDNN_STATUS_EXECUTION_FAILED|the launch timed out and was terminated"
)
"""As a rule the program's; the device's only where the driver or the counters say so."""


@dataclass(frozen=True)
class DeviceFault:
    """A fault of a GPU or of its host, in words."""

    reason: str
    scope: Literal["gpu", "host"] = "gpu"
    """Which of the two a job should leave."""
    proven: bool = False
    """The driver or the counters report it, not the program's error alone."""


def classify(error: str, evidence: DeviceEvidence | None) -> DeviceFault | None:
    """The fault of the device that made a rank fail with this error or last words; None where it is none's."""
    known = evidence or DeviceEvidence()
    reported = _reported(known)
    hardware, launch = HARDWARE_TEXT.search(error), LAUNCH_TEXT.search(error)
    if reported is not None:
        return reported
    if hardware:
        return DeviceFault(hardware[0], "host" if HOST_TEXT.search(hardware[0]) else "gpu")
    severities = {found.severity for found in known.errors}
    if launch and "program" not in severities:
        return DeviceFault(launch[0])
    if (launch or PROGRAM_TEXT.search(error)) and "warning" in severities:
        warning = next(found for found in known.errors if found.severity == "warning")
        return DeviceFault(warning.meaning, proven=True)
    return None


def _reported(evidence: DeviceEvidence) -> DeviceFault | None:
    """A fault that the driver or the counters report, whatever the program says."""
    failing = [error for error in evidence.errors if error.severity == "hardware"]
    if failing:
        shared = [error for error in failing if error.code in kernel_log.HOST_XIDS]
        first = (shared or failing)[0]
        return DeviceFault(first.meaning, "host" if shared else "gpu", proven=True)
    new = gpu_state.uncorrected_since(evidence.before, evidence.after)
    if new:
        return DeviceFault(f"{new} uncorrectable ECC error{'s' if new > 1 else ''}", proven=True)
    before, after = evidence.before, evidence.after
    if before is not None and after is not None and after.remap_failed and not before.remap_failed:
        return DeviceFault("a memory row could not be remapped", proven=True)
    if before is not None and after is None:
        return DeviceFault("the GPU no longer answers its driver", "host", proven=True)
    return None
