"""A process's state, memory and kernel wait, read from /proc; works without the process's help."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

STATES = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "in an uninterruptible wait of the kernel",
    "Z": "ended",
}
"""States that a process that works is not found in for long; see proc(5)."""
KERNEL_FRAMES = 6
"""Frames of a kernel stack that are shown at most."""


def _read(pid: int, name: str) -> str:
    """A file of /proc; the name of a process, which stands in some, may have any bytes. Raises OSError."""
    return Path(f"/proc/{pid}/{name}").read_text("utf-8", errors="replace")


def process_state(pid: int) -> str:
    """The letter of the process's state, see proc(5); "" when it is gone."""
    with contextlib.suppress(OSError):
        return _read(pid, "stat").rpartition(")")[2].split()[0]
    return ""


def rss_mib(pid: int) -> int:
    """Resident memory of the process in MiB, shared pages included; 0 when it is gone."""
    with contextlib.suppress(OSError, ValueError):
        return int(_read(pid, "statm").split()[1]) * mmap.PAGESIZE >> 20
    return 0


def blocks_signal(pid: int, number: int) -> bool:
    """Whether the process's main thread blocks a signal; False when it is gone."""
    with contextlib.suppress(OSError, IndexError):
        mask = _read(pid, "status").partition("SigBlk:")[2].split()[0]
        return bool(int(mask, 16) >> (number - 1) & 1)
    return False


def describe_kernel_wait(pid: int) -> list[str]:
    """Lines with the process's state and system call, and its kernel frames where it waits for a device."""
    letter = process_state(pid)
    if not letter:
        return ["gone"]
    facts = [f"state {letter}: {STATES.get(letter, 'runs, or sleeps in a call')}"]
    for name in ("wchan", "syscall"):
        with contextlib.suppress(OSError):
            facts.append(f"{name} {_read(pid, name).split(chr(10))[0]}")
    lines = [", ".join(facts)]
    with contextlib.suppress(OSError):
        lines += _read(pid, "stack").splitlines()[:KERNEL_FRAMES] if letter == "D" else []
    return lines
