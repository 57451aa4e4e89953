"""The places of a sweep's next trial: asked for while others run, and there when all of its workers have theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.host.stop_request import StopSignals
from cluster.raycluster import status
from cluster.raycluster.local_cluster import LocalRayCluster
from cluster.supervision import slots
from cluster.supervision.slots import Slot
from cluster.sweep.board import Board
from train.config.schema import ClusterConfig, Config
from train.errors import UserError
from train.util.format import plural

HOLDERS_S = 5.0
"""Between two looks at who else holds the cluster."""
MOST_REBUILDS = 3
"""Of the sweep's own Ray cluster, between two trials that end."""

FindCorpus = Callable[[Config, Callable[[dict[str, Any]], None]], str]


@dataclass(frozen=True)
class SweepResources:
    """What trials run on."""

    device: str
    target: str
    folder: str
    """Name of the private folder, with its warm process, on every host."""
    signals: StopSignals
    find_corpus: FindCorpus
    private: LocalRayCluster | None

    def lost(self) -> bool:
        """Whether the sweep's own Ray cluster has ended."""
        return self.private is not None and self.private.lost()


class SlotPool:
    """What the next trial waits for."""

    def __init__(self, ground: SweepResources, board: Board) -> None:
        self.ground, self.board = ground, board
        self.gangs: list[list[Slot]] = []
        """Left by trials that have ended, with their stewards; last, asked for."""
        self.looked = 0.0
        self.rebuilt = 0

    def take(self, cluster: ClusterConfig, running: int) -> list[Slot]:
        """The places of a trial's workers; none where they are not there yet: they are asked for, and who holds them is said, with
        ``running`` trials of this sweep.
        """
        fitting: list[list[Slot]] = []
        for gang in self.gangs:
            if slots.gang_fits(gang, cluster, self.ground.device):
                fitting.append(gang)
            else:
                slots.release_gang(gang)
        self.gangs = fitting or [slots.request_gang(cluster, self.ground.device, cluster.workers)]
        for n, gang in enumerate(self.gangs):
            if slots.gang_is_placed(gang):
                self.board.foot = ""
                return self.gangs.pop(n)
        if time.monotonic() > self.looked + HOLDERS_S:
            self.looked = time.monotonic()
            self._say_who_holds(cluster.workers, running)
        return []

    def leave(self, gang: list[Slot]) -> None:
        """A trial has ended: the next one that asks for as much has its places and its stewards."""
        if gang:
            self.gangs.insert(0, gang)

    def give_up(self) -> None:
        """No trial needs any more."""
        for gang in self.gangs if not self.ground.lost() else ():
            slots.release_gang(gang)
        self.gangs = []

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
        self.ground.signals.install()
        self.gangs = []

    def _say_who_holds(self, workers: int, running: int) -> None:
        others = [str(holder) for holder in status.holders() if holder.pid != os.getpid()]
        mine = [f"{plural(running, 'trial')} of this sweep"] if running else []
        text = f"the next trial waits for room for {plural(workers, 'worker')}: held by {'; '.join([*mine, *others]) or 'nobody yet'}"
        if others and text != self.board.foot:
            self.board.say(f"  {text}", "yellow")
        self.board.foot = text
