"""The standard streams of a command: a terminal that goes, a full disk or a reader that left ends no work.

Every command calls one of three functions before its heavy imports. What it writes passes here, secrets are hidden in
it, and what cannot be written is decided here and not at each print:

guard_report   of work that goes on whoever watches: what cannot be written is left out, and nobody who does not read is
               waited for
guard_result   of a command whose output is its work: it ends quietly when its reader has left, and says when a disk is
               full
guard_log      of processes whose output goes to a file: what cannot be written is left out
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import io
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from train.errors import ExitCode
from train.util.redact import redact

MOST_WAITING = 1000
"""Writes, of at most 4 KiB each, that wait for a reader who does not read."""
STALLED_S = 1.0
"""Without a byte read: from then on nobody is waited for, until there is room again."""
LAST_S = 5.0
"""The same at the end, for what is still to be written."""
IN_ORDER_S = 0.05
"""Standard error waits so long for what standard output has still to write, and the other way round."""
CHECK_S = 0.002
LEFT_OUT = "\n[lines are missing here: they were not read in time]\n"

Send = Callable[[bytes], None]


class GuardedStream(io.TextIOBase):
    """A standard stream, which hides secrets; ``send`` writes the bytes and decides what an error means."""

    def __init__(self, fd: int, encoding: str, send: Send) -> None:
        self.fd, self.send, self._encoding = fd, send, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the terminal or the locale, in which what it lacks is written as an escape."""
        return self._encoding

    def write(self, text: str) -> int:
        """Writes all of ``text``, or does what the guard does where it cannot."""
        self.send(redact(text).encode(self._encoding, "backslashreplace"))
        return len(text)

    def fileno(self) -> int:
        """The number of the descriptor."""
        return self.fd

    def isatty(self) -> bool:
        """Whether it is a terminal, which one that is gone no longer is."""
        return os.isatty(self.fd)

    def writable(self) -> bool:
        """Whether it is for writing, which it is."""
        return True


def write_all(fd: int, data: bytes) -> None:
    """Writes all of ``data``; another process that shares the descriptor may have made it a non-blocking one."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select([], [fd], [])


def write_or_leave_out(fd: int, data: bytes) -> None:
    """Writes what can be written: the disk of a log may have room again, so the next text is tried too."""
    with contextlib.suppress(OSError):
        write_all(fd, data)


def write_or_end(fd: int, data: bytes) -> None:
    """Writes, or ends the command: quietly where the reader has left, else with the reason."""
    try:
        write_all(fd, data)
    except BrokenPipeError:
        raise SystemExit(ExitCode.OK) from None
    except OSError as error:
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(ExitCode.FAILURE) from None


class Outbox:
    """Writes to a descriptor from a thread, so that a reader who does not read holds up nothing else.

    A reader who is only slow is waited for; one who reads nothing for STALLED_S is not, and what then is more than
    MOST_WAITING is left out, with a line that says so. Signal handlers write too: they interrupt the main thread
    anywhere, so nothing here takes a lock in Python.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pid = os.getpid()
        self.others: list[Outbox] = []
        self._pending: collections.deque[bytes] = collections.deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        """An entry for each of ``_pending``, which stays there until it is written."""
        self._written = 0
        self._left_out = self._stalled = False
        self._thread: threading.Thread | None = None

    def send(self, data: bytes) -> None:
        """Hands over ``data`` to be written."""
        if os.getpid() != self.pid:  # forked: the thread stayed behind
            write_or_leave_out(self.fd, data)
            return
        for other in self.others:
            other.wait(0, IN_ORDER_S)
        if self._stalled:
            self._stalled = len(self._pending) > MOST_WAITING // 2
        else:
            self._stalled = not self.wait(MOST_WAITING, STALLED_S)
        if self._stalled:
            self._left_out = True
            return
        if self._left_out:
            self._left_out, data = False, LEFT_OUT.encode() + data
        for begin in range(0, len(data), select.PIPE_BUF):
            self._pending.append(data[begin : begin + select.PIPE_BUF])
            self._wake.put(None)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name=f"output-{self.fd}", daemon=True)
            self._thread.start()

    def wait(self, most: int, patience_s: float) -> bool:
        """Waits until at most ``most`` writes are left; False where none was made for ``patience_s``."""
        seen, since = self._written, time.monotonic()
        while len(self._pending) > most:
            now = time.monotonic()
            if self._written != seen:
                seen, since = self._written, now
            if now - since > patience_s:
                return False
            time.sleep(CHECK_S)
        return True

    def _write(self) -> None:
        while True:
            self._wake.get()
            write_or_leave_out(self.fd, self._pending[0])
            self._pending.popleft()
            self._written += 1


_outboxes: list[Outbox] = []


def flush_report() -> None:
    """Waits until all is written that is still read; to be called before a process ends without Python's own end."""
    for outbox in _outboxes:
        if os.getpid() == outbox.pid:
            outbox.wait(0, LAST_S)


def guard_report() -> None:
    """Guards the output of work that goes on whoever watches; see the module."""
    if not _outboxes:
        _outboxes.extend([Outbox(1), Outbox(2)])
        for outbox in _outboxes:
            outbox.others = [other for other in _outboxes if other is not outbox]
        atexit.register(flush_report)
    _guard(_outboxes[0].send, _outboxes[1].send)
    # `stty tostop` would stop a job in the background at its first line.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)


def guard_result() -> None:
    """Guards the output of a command whose output is its work; see the module."""
    _guard(lambda data: write_or_end(1, data), lambda data: write_or_leave_out(2, data))


def guard_log() -> None:
    """Guards the output of a process that writes into a file; see the module."""
    _guard(lambda data: write_or_leave_out(1, data), lambda data: write_or_leave_out(2, data))


def _guard(out: Send, err: Send) -> None:
    """Opens what is closed on nothing, else the next file that is opened would get the number; sets the streams."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdout = GuardedStream(1, _encoding(sys.stdout), out)
    sys.stderr = GuardedStream(2, _encoding(sys.stderr), err)


def _encoding(stream: Any) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def end_on_interrupt() -> None:
    """Ctrl-C ends this process at once and without a traceback: during imports, and where nothing is to be undone."""
    _handle([signal.SIGINT], lambda number, frame: os._exit(ExitCode.INTERRUPTED))


def raise_on_signals(*numbers: signal.Signals) -> None:
    """These signals are a KeyboardInterrupt: for work that has something to undo."""
    _handle(numbers, signal.default_int_handler)


def _handle(numbers: Collection[signal.Signals], handler: Callable[[int, Any], Any]) -> None:
    """Sets a handler, except where the signal is ignored, as by nohup and by scripts for jobs in the background."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # launch.sh blocks SIGINT until there is a handler
