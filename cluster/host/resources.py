"""Counts the CPUs and GPUs of this host that a job may use, and the kernel's out-of-memory kills."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections.abc import Sequence
from pathlib import Path

MOST_FILES = 1 << 20
"""Open files that a process is allowed here at most: more are of no use, and some programs try to close them all."""


def count_gpus() -> int:
    """NVIDIA devices that this process may use; read from /dev, so that CUDA is not started."""
    files = [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
    return usable_gpus(files, os.environ.get("CUDA_VISIBLE_DEVICES"))


def usable_gpus(device_files: Sequence[str], visible: str | None) -> int:
    """How many GPUs there are, given the cards' files in /dev and CUDA_VISIBLE_DEVICES.

    A card that is split has one file and many instances, each of them a device: those named count.
    """
    if visible is None or not device_files:
        return len(device_files)
    named = [name.strip() for name in visible.split(",")]
    named = list(itertools.takewhile(lambda name: name not in ("", "-1"), named))  # CUDA stops reading there
    instances = [name for name in named if name.startswith("MIG-")]
    return len(instances) + min(len(device_files), len(named) - len(instances))


def raise_file_limit() -> None:
    """Lets this process and those that it starts open as many files as the host allows: a rank has sockets to all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def count_cpus() -> int:
    """Cores that this process may use: the least of its affinity, its cgroup's quota and its share of a SLURM node.

    The quota is rounded down, and at least 1.
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, whole = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        cores = min(cores, max(1, int(quota) // int(whole)))
    with contextlib.suppress(OSError, ValueError):
        microseconds = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text("utf-8"))
        if microseconds > 0:
            period = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text("utf-8"))
            cores = min(cores, max(1, microseconds // period))
    with contextlib.suppress(KeyError, ValueError):
        cores = min(cores, int(os.environ["SLURM_CPUS_ON_NODE"]))
    return cores


def oom_kills() -> int:
    """Out-of-memory kills by the kernel so far: the sum of the host's and the cgroup's counters."""
    total = 0
    counters = [Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text("utf-8", errors="replace").splitlines():
            counters.append(Path("/sys/fs/cgroup" + line.split(":", 2)[2]) / "memory.events")
    for path in counters:
        with contextlib.suppress(OSError):
            lines = path.read_text("utf-8").splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total
