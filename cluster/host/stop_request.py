"""Signals to a driver: the first asks the job to save and stop, the second ends everything at once.

Until training has begun there is nothing to save, and the first one ends everything too: what a start builds is made to
be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable

import psutil

from train.errors import ExitCode
from train.util import streams

EARLY = "Stopped before training began: nothing is lost. Run the same command again to start."


class StopRequest:
    """Asks a job to save and stop. Set from a signal handler or another thread, read by the job's supervisor."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that asked for the stop; None while nothing has."""

    @property
    def requested(self) -> bool:
        """Whether the job was asked to stop."""
        return self.signal is not None

    def request(self, number: int) -> None:
        """Asks for the stop on behalf of signal ``number``; the first one stands."""
        if self.signal is None:
            self.signal = number


class StopSignals:
    """Handles a driver process's signals: fills in ``stop``, or ends the process after the actions of ``on_exit``."""

    def __init__(self) -> None:
        self.stop = StopRequest()
        self.on_exit: list[Callable[[], None]] = []
        self._training = False

    def install(self) -> None:
        """Installs the handlers; to be repeated after ``ray.init``, which installs its own."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup and `&` in scripts say by SIG_IGN that a signal is not for us.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def training_began(self) -> None:
        """From here on there is something to save, so the first signal is a request and not the end."""
        self._training = True

    def _handle(self, number: int, frame: object) -> None:
        if not self._training or self.stop.requested:
            for action in self.on_exit:
                action()
            if not self._training:
                print(EARLY, file=sys.stderr, flush=True)
            end_now(128 + number if self._training else ExitCode.STOPPED)
        self.stop.request(number)


def end_now(code: int) -> None:
    """Ends this process and its children at once; what the children started, the kernel ends with them."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    streams.flush_report()
    os._exit(code)
