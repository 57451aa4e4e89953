"""Counts the CPUs and GPUs of this host that a job may use, and the kernel's out-of-memory kills."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def count_gpus() -> int:
    """NVIDIA devices that this process may use; read from /dev, so that CUDA is not started."""
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    return min(devices, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def count_cpus() -> int:
    """Cores that this process may use: the least of its affinity, its cgroup's quota and its share of a SLURM node.

    The quota is rounded down, and at least 1.
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    with contextlib.suppress(OSError, ValueError):
        microseconds = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        if microseconds > 0:
            cores = min(cores, max(1, microseconds // int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())))
    with contextlib.suppress(KeyError, ValueError):
        cores = min(cores, int(os.environ["SLURM_CPUS_ON_NODE"]))
    return cores


def oom_kills() -> int:
    """Out-of-memory kills by the kernel so far: the sum of the host's and the cgroup's counters."""
    total = 0
    counters = [Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            counters.append(Path("/sys/fs/cgroup" + line.split(":", 2)[2]) / "memory.events")
    for path in counters:
        with contextlib.suppress(OSError):
            total += sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("oom_kill "))
    return total
