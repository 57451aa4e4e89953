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
from cluster.raycluster.placement import Node, WorkerRequest
from cluster.supervision import slots
from cluster.supervision.left_places import LeftPlace, room_without
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
        self.left: list[LeftPlace] = []
        """GPUs and hosts that trials have left because of a fault: no later trial of the sweep trains there."""
        self.holders_checked = 0.0
        self.restarts = 0

    def take_gang(self, cluster: ClusterConfig, running: Sequence[int]) -> list[Slot]:
        """The slots of a trial's workers; empty while they are not placed: then they are requested.

        Says who holds the cluster meanwhile. ``running``: the workers of each trial of this sweep that does.
        """
        if running and self.left and not self._has_room_beside_left(cluster, sum(running)):
            return []
        fitting: list[list[Slot]] = []
        for gang in self.gangs:
            if slots.gang_fits(gang, cluster, self.resources.device):
                fitting.append(gang)
            else:
                slots.release_gang(gang)
        self.gangs = fitting or [self._request_gang(cluster)]
        for n, gang in enumerate(self.gangs):
            if slots.gang_is_placed(gang):
                self.board.footer = ""
                return self.gangs.pop(n)
        if time.monotonic() > self.holders_checked + HOLDERS_S:
            self.holders_checked = time.monotonic()
            self._show_holders(cluster.worker_count, len(running))
        return []

    def _request_gang(self, cluster: ClusterConfig) -> list[Slot]:
        return slots.request_gang(cluster, self.resources.device, cluster.worker_count, self.left)

    def _has_room_beside_left(self, cluster: ClusterConfig, running: int) -> bool:
        """Whether a trial's workers fit beside ``running`` others without the places that were left.

        Ray knows nothing of a left GPU and may give it to the trial, which then needs another one.
        """
        gpus = int(self.resources.device == "gpu")
        request = WorkerRequest(cluster.worker_count, cluster.cpus_per_worker, gpus)
        return room_without(status.living_nodes(), request, self.left) >= running + cluster.worker_count

    def leave(self, places: Sequence[LeftPlace]) -> None:
        """Notes the places that a trial has left, and withdraws the requests that do not know of them."""
        new = [place for place in places if place not in self.left]
        if new:
            self.left += new
            self.release_all()
            words = "; ".join(f"{place.words} ({place.reason})" for place in new)
            self.board.print_line(f"  no trial of this sweep trains on {words} any more", "yellow")

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
        self.left = [place.by_host_name() for place in self.left]

    def _show_holders(self, workers: int, running: int) -> None:
        others = [str(holding) for holding in status.job_holdings() if holding.pid != os.getpid()]
        mine = [f"{plural(running, 'trial')} of this sweep"] if running else []
        held_by = "; ".join([*mine, *others]) or "nobody yet"
        text = f"the next trial waits for room for {plural(workers, 'worker')}: held by {held_by}"
        if others and text != self.board.footer:
            self.board.print_line(f"  {text}", "yellow")
        self.board.footer = text
