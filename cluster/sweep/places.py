"""The places of a sweep's next trial: asked for while others run, and there when all of its workers have theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster import slots, view
from cluster.private import Private
from cluster.signals import Signals
from cluster.sweep.table import Board
from train.errors import UserError
from train.schema import Cluster, Config
from train.words import plural

HOLDERS_S = 5.0
"""Between two looks at who else holds the cluster."""
MOST_REBUILDS = 3
"""Of the sweep's own Ray cluster, between two trials that end."""

FindCorpus = Callable[[Config, Callable[[dict[str, Any]], None]], str]


@dataclass(frozen=True)
class Ground:
    """What trials run on."""

    device: str
    target: str
    folder: str
    """Name of the private folder, with its warm process, on every host."""
    signals: Signals
    find_corpus: FindCorpus
    private: Private | None

    def lost(self) -> bool:
        """Whether the sweep's own Ray cluster has ended."""
        return self.private is not None and self.private.lost()


class Places:
    """What the next trial waits for."""

    def __init__(self, ground: Ground, board: Board) -> None:
        self.ground, self.board = ground, board
        self.gang: Any = None
        """Asked for, or there."""
        self.looked = 0.0
        self.rebuilt = 0

    def there(self, cluster: Cluster, running: int) -> bool:
        """Whether a trial's workers have their places, which are asked for where nobody has; says who holds them, with
        ``running`` trials of this sweep.
        """
        if self.gang is None:
            self.gang = slots.gang(cluster, self.ground.device, cluster.workers)
        if slots.placed(self.gang):
            self.board.foot = ""
            return True
        if time.monotonic() > self.looked + HOLDERS_S:
            self.looked = time.monotonic()
            self._say_who_holds(cluster.workers, running)
        return False

    def take(self) -> Any:
        """The places that are there."""
        gang, self.gang = self.gang, None
        return gang

    def give_up(self) -> None:
        """Nobody needs them any more."""
        if self.gang is not None and not self.ground.lost():
            slots.give_up(self.gang)
        self.gang = None

    def rebuild(self) -> None:
        """A new private Ray cluster in place of one that has ended, when the trials on it have. UserError where it never lasts."""
        assert self.ground.private is not None
        self.rebuilt += 1
        if self.rebuilt > MOST_REBUILDS:
            raise UserError(
                f"Ray's processes on this host have ended {self.rebuilt} times and no trial with them: see {self.ground.folder}"
            )
        self.board.say("  Ray's processes on this host have ended: starting them anew", "yellow")
        self.ground.private.again()
        self.ground.signals.listen()
        self.gang = None

    def _say_who_holds(self, workers: int, running: int) -> None:
        others = [str(holder) for holder in view.holders() if holder.pid != os.getpid()]
        mine = [f"{plural(running, 'trial')} of this sweep"] if running else []
        text = (
            f"the next trial waits for room for {plural(workers, 'worker')}: held by {'; '.join([*mine, *others]) or 'nobody yet'}"
        )
        if others and text != self.board.foot:
            self.board.say(f"  {text}", "yellow")
        self.board.foot = text
