"""How the driver hears SIGINT, SIGTERM and SIGHUP: the first asks for a stop that saves, the second ends everything now."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import psutil

STOPPED = 75
PATIENCE_S = 4.0
"""How long the unwinding of an early stop may take before the process just ends."""


class Asked(BaseException):
    """A stop was asked for before training began: there is nothing to save."""


class Signals:
    """The driver's ear. While ``early``, a signal raises Asked in the main thread; later it only counts."""

    def __init__(self, on_second: Callable[[], None]) -> None:
        self.heard: int | None = None
        self._early = True
        self._on_second = on_second
        self.again()

    def again(self) -> None:
        """Installs the handlers; to be repeated after ``ray.init``, which installs its own."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup and `&` in scripts say by SIG_IGN that a signal is not for us.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def running(self) -> None:
        """From here on there is something to save: a signal is looked up, not raised."""
        self._early = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Puts signals off for a moment that must not be torn."""
        numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _handle(self, number: int, frame: object) -> None:
        if self.heard is not None:
            self._on_second()
            end_now(128 + number)
        self.heard = number
        if self._early:
            threading.Thread(target=_give_up_later, daemon=True).start()
            raise Asked


def end_now(code: int) -> None:
    """Ends this process and what it started; what its children started, the kernel ends with them."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(code)


def _give_up_later() -> None:
    threading.Event().wait(PATIENCE_S)
    end_now(STOPPED)
