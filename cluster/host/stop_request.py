"""How the driver hears SIGINT, SIGTERM and SIGHUP: the first asks for a stop that saves, the second ends all now.

Until there is something to save, the first one ends everything too: what a start builds is made to be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable

import psutil

from train.errors import ExitCode

EARLY = "Stopped before training began: nothing is lost. Run the same command again to start."


class Signals:
    """The driver's ear. ``heard``: the first signal that came while training; ``on_end``: done before a hasty end."""

    def __init__(self) -> None:
        self.heard: int | None = None
        self.on_end: list[Callable[[], None]] = []
        self._early = True

    def listen(self) -> None:
        """Installs the handlers; to be repeated after ``ray.init``, which installs its own."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup and `&` in scripts say by SIG_IGN that a signal is not for us.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def running(self) -> None:
        """From here on there is something to save: the first signal is noted, for the supervisor to see."""
        self._early = False

    def _handle(self, number: int, frame: object) -> None:
        if self._early or self.heard is not None:
            for action in self.on_end:
                action()
            if self._early:
                print(EARLY, file=sys.stderr, flush=True)
            end_now(ExitCode.STOPPED if self._early else 128 + number)
        self.heard = number


def end_now(code: int) -> None:
    """Ends this process and what it started; what its children started, the kernel ends with them."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(code)
