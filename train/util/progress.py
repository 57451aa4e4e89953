"""Says how far slow work is, now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 10.0


class SlowProgress:
    """Notes the share of some work that is done, every EVERY_S seconds: nothing where all of it takes less."""

    def __init__(self, what: str, note: Callable[[str], None]) -> None:
        """``what`` is done, in words for the user, such as "weights"; ``note`` shows a line of text."""
        self.what, self.note = what, note
        self.due = time.monotonic() + EVERY_S

    def __call__(self, share: float) -> None:
        """``share`` of the work, between 0 and 1, is done."""
        if (now := time.monotonic()) >= self.due:
            self.due = now + EVERY_S
            self.note(f"{self.what}: {share:.0%}")
