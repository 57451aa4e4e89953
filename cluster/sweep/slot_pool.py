"""The slots of a sweep's next trial: requested while others run, used once all are placed.

A gang is the slots of all workers of one trial. Ray places all of a gang or none, so a trial never waits with half of
them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.host.stop_request import StopSignals
from cluster.raycluster import status
from cluster.raycluster.local_cluster import LocalRayCluster
from cluster.raycluster.placement import Node
from cluster.supervision import slots
from cluster.supervision.slots import Slot
from cluster.sweep.board import Board
from train.config.schema import ClusterConfig
from train.errors import UserError
from train.util.format import plural

HOLDERS_S = 5.0
"""Between two checks of who else holds the cluster."""
MOST_RESTARTS = 3
"""Of the sweep's own Ray cluster, between the ends of two trials."""


@dataclass(frozen=True)
class SweepResources:
    """Device, fork servers, signal handlers and Ray cluster that all trials of a sweep share."""

    device: str
    nodes: Sequence[Node]
    """The cluster's nodes when the sweep joined it."""
    target: str
    folder: str
    """Name of the private folder, with its fork server, on every host."""
    signals: StopSignals
    local_cluster: LocalRayCluster | None
    """The Ray cluster of this sweep alone, where it has one."""

    def lost(self) -> bool:
        """Whether the sweep's own Ray cluster has ended."""
        return self.local_cluster is not None and self.local_cluster.lost()


class SlotPool:
    """Gangs that no trial uses now: left by trials that have ended, or requested for the next one."""

    def __init__(self, resources: SweepResources, board: Board) -> None:
        self.resources, self.board = resources, board
        self.gangs: list[list[Slot]] = []
        """Those of ended trials, with their agents, before a requested one."""
        self.holders_checked = 0.0
        self.restarts = 0

    def take_gang(self, cluster: ClusterConfig, running: int) -> list[Slot]:
        """The slots of a trial's workers; empty while they are not placed: then they are requested.

        Says who holds the cluster meanwhile. ``running``: how many trials of this sweep do.
        """
        fitting: list[list[Slot]] = []
        for gang in self.gangs:
            if slots.gang_fits(gang, cluster, self.resources.device):
                fitting.append(gang)
            else:
                slots.release_gang(gang)
        self.gangs = fitting or [slots.request_gang(cluster, self.resources.device, cluster.worker_count)]
        for n, gang in enumerate(self.gangs):
            if slots.gang_is_placed(gang):
                self.board.footer = ""
                return self.gangs.pop(n)
        if time.monotonic() > self.holders_checked + HOLDERS_S:
            self.holders_checked = time.monotonic()
            self._show_holders(cluster.worker_count, running)
        return []

    def return_gang(self, gang: list[Slot]) -> None:
        """Keeps the slots and agents of a trial that has ended for the next one that needs as many."""
        if gang:
            self.gangs.insert(0, gang)

    def release_all(self) -> None:
        """Gives all slots back to Ray, when no trial needs them any more."""
        for gang in self.gangs if not self.resources.lost() else ():
            slots.release_gang(gang)
        self.gangs = []

    def restart_cluster(self) -> None:
        """Starts the sweep's own Ray cluster anew, once the trials on it have ended. UserError if that never lasts."""
        assert self.resources.local_cluster is not None
        self.restarts += 1
        if self.restarts > MOST_RESTARTS:
            raise UserError(
                f"Ray's processes on this host have ended {self.restarts} times and no trial with them: "
                f"their logs are in {self.resources.folder}. Is this host short of memory or processes (ulimit -u)? "
                "The same command goes on with the sweep"
            )
        self.board.print_line("  Ray's processes on this host have ended: starting them anew", "yellow")
        self.resources.local_cluster.restart(by_sweep=True)
        self.resources.signals.install()
        self.gangs = []

    def _show_holders(self, workers: int, running: int) -> None:
        others = [str(holding) for holding in status.job_holdings() if holding.pid != os.getpid()]
        mine = [f"{plural(running, 'trial')} of this sweep"] if running else []
        held_by = "; ".join([*mine, *others]) or "nobody yet"
        text = f"the next trial waits for room for {plural(workers, 'worker')}: held by {held_by}"
        if others and text != self.board.footer:
            self.board.print_line(f"  {text}", "yellow")
        self.board.footer = text
