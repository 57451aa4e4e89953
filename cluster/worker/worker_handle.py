"""An agent's view of its running worker: heartbeat, signals, stack and the end of its log."""

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

from cluster.device_health import flight_record
from cluster.device_health.nvml import GpuWatch
from cluster.worker import procfs
from cluster.worker.messages import StartOrder
from train.distributed import heartbeat
from train.events import BeatEvent

TAIL_LINES = 20
TAIL_BYTES = 64 << 10
LOG_BYTES = 4 << 20
"""A log that is larger is put aside when the rank starts again: a thousand ranks may share a file system."""
STACK_DUMP_S = 2.0
"""How long a worker may take to write its stacks into its log."""
STACK_DUMP_CHECK_S = 0.2
"""Between looks at the log for whether it goes on writing."""
MAX_FRAMES, MAX_LIBRARY_FRAMES = 14, 3
"""Frames of a stack that are shown at most, and of these the innermost ones that may be libraries'."""
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
LIBC = ctypes.CDLL(None)
REPOSITORY = Path(__file__).resolve().parents[2]


class WorkerHandle:
    """Observes and signals one worker through a pidfd, which never comes to mean another process."""

    def __init__(self, pid: int, order: StartOrder, memory: mmap.mmap, log_offset: int) -> None:
        """``memory``: the worker's heartbeat record. ``log_offset``: size of its log when it was started."""
        self.pid, self.memory, self.log_offset = pid, memory, log_offset
        self.log, self.flight_record = Path(order.log), order.flight_record
        self.identity: dict[str, Any] = {"rank": order.rank, "generation": order.rendezvous.attempt}
        self.gpu: GpuWatch | None = None
        """The GPU that it uses, if any."""
        self.killed = False
        """It was told to end for another's sake: nothing need be said of how it ends."""
        self.pidfd: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self.pidfd = os.pidfd_open(pid)

    def close(self) -> None:
        """Closes the pidfd; from then on signals are not sent."""
        pidfd, self.pidfd = self.pidfd, None
        if pidfd is not None:
            os.close(pidfd)

    def signal(self, number: int) -> None:
        """Sends the worker a signal, if it lives."""
        self.killed = self.killed or number == signal.SIGKILL
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(self.pidfd, number)

    def _signal_main_thread(self, number: int) -> None:
        """Signals the main thread, so that a stopped one handles it before it runs on.

        Were another thread to handle it, the main one would have left the frame in which it was stopped.
        """
        if self.pidfd is not None and not select.select([self.pidfd], [], [], 0)[0]:
            LIBC.tgkill(self.pid, self.pid, number)

    def heartbeat(self) -> dict[str, Any]:
        """The worker's heartbeat record, and what the kernel says of its process."""
        kernel: dict[str, Any] = {"state": procfs.process_state(self.pid), "rss_mib": procfs.rss_mib(self.pid)}
        return BeatEvent(**heartbeat.read(self.memory), **kernel, **self.identity).to_json()

    def inspect(self) -> dict[str, Any]:
        """Where the worker is, see ``WorkerAgent.inspect_workers``."""
        kernel = procfs.describe_kernel_wait(self.pid)
        if not self.log.exists():
            return {"kernel": kernel, "stack": [], "flight": []}
        self.flight_record.unlink(missing_ok=True)
        asked = procfs.blocks_signal(self.pid, signal.SIGUSR2)  # else it would die of it, early in its start
        if asked:
            self.signal(signal.SIGUSR2)
        start = size = self.log.stat().st_size
        self._signal_main_thread(signal.SIGUSR1)  # faulthandler's, in C: it needs not the interpreter's lock
        self.signal(signal.SIGCONT)
        began = time.monotonic()
        while time.monotonic() < began + STACK_DUMP_S and (size == start or size != self.log.stat().st_size):
            size = self.log.stat().st_size
            time.sleep(STACK_DUMP_CHECK_S)
            if size == start and time.monotonic() > began + STACK_DUMP_S / 2:
                self.signal(signal.SIGUSR1)  # the main thread is in the kernel and cannot answer: any other may
        with self.log.open("rb") as file:
            file.seek(start)
            stack = main_thread_stack(file.read().decode(errors="replace"))
        while asked and time.monotonic() < began + STACK_DUMP_S and not self.flight_record.exists():
            time.sleep(STACK_DUMP_CHECK_S)
        return {"kernel": kernel, "stack": stack, "flight": read_flight_record(self.flight_record)}


def read_flight_record(path: Path) -> list[dict[str, Any]]:
    """The state of a rank's process groups by its flight record; none where it has not written one."""
    dumps = path.read_bytes().splitlines() if path.exists() else []
    return [record.to_json() for dump in dumps for record in flight_record.read_dump(dump)]


def main_thread_stack(dump: str) -> list[str]:
    """The main thread's frames in a dump of faulthandler, innermost first: "train/loop.py:12 in train".

    faulthandler writes the main thread last. Of libraries' frames only the innermost are kept: the line of our code
    that called them says more.
    """
    frames, last = [], re.split(r"^(?:Current thread|Thread) 0x.*\n", dump, flags=re.MULTILINE)[-1]
    for number, (file, line, function) in enumerate(FRAME.findall(last)):
        library = file.partition("site-packages/")[2]
        if number < MAX_LIBRARY_FRAMES or not (library or "/lib/python" in file or file.startswith("<")):
            frames.append(f"{library or file.removeprefix(f'{REPOSITORY}/')}:{line} in {function}")
    return frames[:MAX_FRAMES]


def begin_log(log: Path) -> int:
    """The offset in ``log`` at which a worker that starts now begins; one that is too large becomes ``<log>.1``."""
    try:
        size = log.stat().st_size
        if size > LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))
            size = 0
    except OSError:
        return 0
    return size


def log_tail(log: Path, offset: int) -> list[str]:
    """The last ``TAIL_LINES`` lines of ``log`` after byte ``offset``; none where it cannot be read."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("Extension modules:")]
    return lines[-TAIL_LINES:]
