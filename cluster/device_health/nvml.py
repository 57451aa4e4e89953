"""Reads a GPU's counters through NVML. Only on hosts with a GPU: nothing is imported or loaded before it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.device_health import kernel_log
from cluster.device_health.evidence import DeviceEvidence
from cluster.device_health.gpu_state import GpuState


def _library() -> Any:
    # NVIDIA's own nvidia-ml-py, of which Ray carries a copy: it needs no package of ours.
    from ray._private.thirdparty import pynvml

    return pynvml


def read_state(gpu: str) -> GpuState | None:
    """The counters of the GPU with that number or UUID; None without a driver, or where the GPU does not answer."""
    try:
        nvml = _library()
        nvml.nvmlInit()  # for good: on some hosts it takes a second
    except Exception:  # no library, no driver, or one that does not answer
        return None
    try:
        by_uuid = gpu.startswith(("GPU-", "MIG-"))
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu) if by_uuid else nvml.nvmlDeviceGetHandleByIndex(int(gpu))
        return _state(nvml, handle)
    except (nvml.NVMLError, ValueError):
        return None


def _state(nvml: Any, handle: Any) -> GpuState:
    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        """NVML's answer; None where this GPU or driver has none."""
        try:
            return question(handle, *arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    corrected, uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    rows = ask(nvml.nvmlDeviceGetRemappedRows) or (None,) * 4
    double_bit = nvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR
    pages = ask(nvml.nvmlDeviceGetRetiredPages, double_bit) if rows[0] is None else None
    memory, pci = ask(nvml.nvmlDeviceGetMemoryInfo), ask(nvml.nvmlDeviceGetPciInfo)
    power, limit = ask(nvml.nvmlDeviceGetPowerUsage), ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
    return GpuState(
        uuid=_text(ask(nvml.nvmlDeviceGetUUID)),
        name=_text(ask(nvml.nvmlDeviceGetName)),
        bus=_text(pci.busId) if pci is not None else "",
        ecc_corrected=ask(nvml.nvmlDeviceGetTotalEccErrors, corrected, nvml.NVML_VOLATILE_ECC),
        ecc_uncorrected=ask(nvml.nvmlDeviceGetTotalEccErrors, uncorrected, nvml.NVML_VOLATILE_ECC),
        ecc_uncorrected_ever=ask(nvml.nvmlDeviceGetTotalEccErrors, uncorrected, nvml.NVML_AGGREGATE_ECC),
        rows_remapped=rows[1],
        remap_pending=None if rows[2] is None else bool(rows[2]),
        remap_failed=None if rows[3] is None else bool(rows[3]),
        pages_retired=None if pages is None else len(list(pages)),
        throttle=ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons),
        sm_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        sm_max_mhz=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        memory_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        power_w=None if power is None else power / 1000,
        power_limit_w=None if limit is None else limit / 1000,
        memory_used_mib=None if memory is None else int(memory.used) >> 20,
        memory_mib=None if memory is None else int(memory.total) >> 20,
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")


class GpuWatch:
    """Remembers a GPU's counters from the start of a worker, to tell what changed when it has ended.

    A GPU that fails may block whoever asks its driver, so a thread asks, and nobody waits for it for long.
    """

    def __init__(self, gpus: Sequence[str]) -> None:
        """``gpus``: numbers or UUIDs of those that Ray gave the worker, of which it uses the first."""
        self.gpu, self.since = next(iter(gpus), ""), time.monotonic()
        self.before: GpuState | None = None
        self._reader: threading.Thread | None = None
        self._ask(self._keep_before)

    def read(self, patience_s: float) -> tuple[bool, GpuState | None]:
        """Whether there was an answer within ``patience_s``, and the counters, None where the driver has lost it."""
        answers: list[GpuState | None] = []
        if self._reader is not None:
            self._reader.join(patience_s)
            if self._reader.is_alive():
                return False, None
        self._ask(lambda: answers.append(read_state(self.gpu))).join(patience_s)
        return bool(answers), answers[0] if answers else None

    def collect(self, patience_s: float) -> DeviceEvidence:
        """The evidence of this moment; absent sources are left out."""
        answered, after = self.read(patience_s)
        messages = tuple(kernel_log.read_driver_messages(self.since - 1.0))
        return DeviceEvidence(self.before, after, messages) if answered else DeviceEvidence(messages=messages)

    def _keep_before(self) -> None:
        self.before = read_state(self.gpu)

    def _ask(self, question: Callable[[], None]) -> threading.Thread:
        self._reader = threading.Thread(target=question, daemon=True)
        self._reader.start()
        return self._reader
