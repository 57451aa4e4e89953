"""A running trainer as its steward holds it: its pulse, its signals, its stack and the end of its log."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

from cluster.worker import procfs
from train.distributed import heartbeat
from train.events import BeatEvent

TAIL_LINES = 20
TAIL_BYTES = 64 << 10
DUMP_S, DUMP_LOOK_S = 2.0, 0.2
"""How long a trainer may take to write its stacks, and between looks whether it goes on writing."""
FRAMES, INNERMOST = 14, 3
"""So many frames of a stack are shown at most, and so many of libraries'."""
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
LIBC = ctypes.CDLL(None)
REPOSITORY = Path(__file__).resolve().parents[2]


class WorkerHandle:
    """Held by a handle that never comes to mean another process."""

    def __init__(self, pid: int, order: dict[str, Any], memory: mmap.mmap, offset: int) -> None:
        """``offset``: where what it writes begins in its log."""
        self.pid, self.memory, self.offset = pid, memory, offset
        self.log = Path(order["log"])
        self.world = {"rank": order["rank"], "generation": order["meeting"]["generation"]}
        self.handle: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self.handle = os.pidfd_open(pid)

    def close(self) -> None:
        """Lets go of it."""
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    def signal(self, number: int) -> None:
        """Sends it a signal, if it lives."""
        if self.handle is not None:
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(self.handle, number)

    def _signal_main_thread(self, number: int) -> None:
        """So that one that was stopped handles it before it goes on; another thread would leave it the time to walk away."""
        if self.handle is not None and not select.select([self.handle], [], [], 0)[0]:
            LIBC.tgkill(self.pid, self.pid, number)

    def heartbeat(self) -> dict[str, Any]:
        """Its pulse, and what the kernel says of it."""
        kernel: dict[str, Any] = {"state": procfs.state(self.pid), "rss_mib": procfs.rss_mib(self.pid)}
        return BeatEvent(**heartbeat.read(self.memory), **kernel, **self.world).to_json()

    def inspect(self) -> dict[str, Any]:
        """See ``Steward.inspect``."""
        kernel = procfs.wait_of(self.pid)
        if not self.log.exists():
            return {"kernel": kernel, "stack": []}
        start = size = self.log.stat().st_size
        self._signal_main_thread(signal.SIGUSR1)  # faulthandler's, in C: it needs not the interpreter's lock
        self.signal(signal.SIGCONT)
        began = time.monotonic()
        while time.monotonic() < began + DUMP_S and (size == start or size != self.log.stat().st_size):
            size = self.log.stat().st_size
            time.sleep(DUMP_LOOK_S)
            if size == start and time.monotonic() > began + DUMP_S / 2:
                self.signal(signal.SIGUSR1)  # the main thread is in the kernel and cannot answer: any other may
        with self.log.open("rb") as file:
            file.seek(start)
            return {"kernel": kernel, "stack": main_stack(file.read().decode(errors="replace"))}


def main_stack(dump: str) -> list[str]:
    """The main thread's frames, innermost first, from what faulthandler wrote, where it comes last: "train/loop.py:12 in train".
    Of libraries', only the innermost: where our code called them is what tells.
    """
    frames, last = [], re.split(r"^(?:Current thread|Thread) 0x.*\n", dump, flags=re.MULTILINE)[-1]
    for number, (file, line, function) in enumerate(FRAME.findall(last)):
        library = file.partition("site-packages/")[2]
        if number < INNERMOST or not (library or "/lib/python" in file or file.startswith("<")):
            frames.append(f"{library or file.removeprefix(f'{REPOSITORY}/')}:{line} in {function}")
    return frames[:FRAMES]


def tail(log: Path, offset: int) -> list[str]:
    """The last lines that were written to ``log`` after byte ``offset``."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("Extension modules:")]
    return lines[-TAIL_LINES:]
