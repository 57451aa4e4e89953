"""The cores that are near a GPU: those of its NUMA node, as far as this process may use them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind_to_device(pci_address: str, least: int) -> int:
    """Keeps this thread, and those that it starts, to the cores near a PCI device (``0000:3b:00.0``): how many."""
    allowed = os.sched_getaffinity(0)
    local = ""
    with contextlib.suppress(OSError):
        local = (PCI_DEVICES / pci_address.lower() / "local_cpulist").read_text("utf-8")
    cores = cores_near(local, allowed, least)
    if cores != allowed:
        os.sched_setaffinity(0, cores)
    return len(cores)


def cores_near(local_cpulist: str, allowed: set[int], least: int) -> set[int]:
    """The allowed cores that are in a device's list, or all that are allowed where these are fewer than ``least``."""
    near = allowed & parse_cpulist(local_cpulist)
    return near if len(near) >= least else allowed


def parse_cpulist(text: str) -> set[int]:
    """The cores of a kernel's list, such as "0-3,8,16-19"."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
