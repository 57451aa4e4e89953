"""What the kernel says of a process, read from /proc: nothing here needs the process's help."""

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


def state(pid: int) -> str:
    """The letter of the process's state; "" when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def rss_mib(pid: int) -> int:
    """Memory that the process holds, shared pages included."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE >> 20
    return 0


def wait_of(pid: int) -> list[str]:
    """Where the kernel has the process: its state and system call, and its frames there if it waits for a device or a disk."""
    letter = state(pid)
    if not letter:
        return ["gone"]
    found = [f"state {letter}: {STATES.get(letter, 'runs, or sleeps in a call')}"]
    for name in ("wchan", "syscall"):
        with contextlib.suppress(OSError):
            found.append(f"{name} {Path(f'/proc/{pid}/{name}').read_text().split(chr(10))[0]}")
    lines = [", ".join(found)]
    with contextlib.suppress(OSError):
        lines += Path(f"/proc/{pid}/stack").read_text().splitlines()[:KERNEL_FRAMES] if letter == "D" else []
    return lines
