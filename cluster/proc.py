"""What the kernel says of a process, read from /proc: nothing here needs the process's help."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "in an uninterruptible wait of the kernel", "Z": "ended"}
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
    """Where the kernel has the process: its state, system call and, where we may read them, its frames in the kernel."""
    found = [f"state {letter}: {STATES.get(letter, 'runs, or sleeps in a call')}" if (letter := state(pid)) else "gone"]
    for name in ("wchan", "syscall", "stack"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/{name}").read_text().split("\n")[:KERNEL_FRAMES]
            found += [f"{name} {line.strip()}" for line in lines if line.strip() not in ("", "0", "running")]
    return found
