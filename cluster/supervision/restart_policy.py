"""Decides whether and when a failed job starts again, from its failures so far; pure.

Failures are counted in a row: progress past the last one resets the count. A failure of the run itself that comes twice
with the same signature at the same step would come a third time, so there is no restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.device_health.device_fault import DeviceFault
from cluster.raycluster.placement import Node, WorkerRequest, count_fitting
from cluster.worker.messages import SlotInfo

FROM_OUTSIDE = ("killed", "host lost", "network lost", "worker lost", "preempted", "device")
"""Faults that say nothing of the run itself, so they may come twice."""
LONGEST_WAIT_S = 60.0
"""Limit of the exponential back-off between restarts."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt of a job."""

    fault: str
    signature: str
    """Text that is equal for failures of the same kind, see ``failure_report.signature``."""
    step: int
    """The furthest step that a rank was at."""
    saved: int
    """Step of the newest checkpoint; 0 without one."""


@dataclass(frozen=True)
class Decision:
    """Whether the job starts again, and after how many seconds; ``message`` says so to the user."""

    again: bool
    message: str
    wait_s: float = 0.0


@dataclass(frozen=True)
class LeftPlace:
    """A GPU, or a whole host, that a job does not use any more because of a fault of the device."""

    node: str
    """Ray's id of the host: one that joins again has another, as it was restarted meanwhile."""
    host: str
    reason: str
    gpu: str = ""
    """The number or UUID of the GPU; empty for all of the host."""

    @classmethod
    def of(cls, info: SlotInfo, fault: DeviceFault) -> LeftPlace:
        """The place to leave after a fault in a slot: its GPU, or its host where that cannot be told apart."""
        gpu = ",".join(info.gpus) if fault.scope == "gpu" else ""
        return cls(info.node, info.host, fault.reason, gpu)

    def covers(self, info: SlotInfo) -> bool:
        """Whether a slot is in this place. A GPU is known by its host's name too, as Ray may have been restarted."""
        if self.gpu:
            return self.gpu in info.gpus and (self.node == info.node or self.host == info.host)
        return self.node == info.node

    @property
    def words(self) -> str:
        """The place for people: "GPU 3 of oar7", "host oar7"."""
        return f"GPU {self.gpu} of {self.host}" if self.gpu else f"host {self.host}"

    @property
    def cure(self) -> str:
        """How the place can be had back."""
        if not self.gpu:
            return f"drain and reboot {self.host}; if it comes again, have its GPUs looked at"
        reset = f"nvidia-smi --gpu-reset -i {self.gpu}"
        return f"have the GPU reset ({reset}) or {self.host} rebooted; have it replaced if it comes again"


def is_left(left: Sequence[LeftPlace], info: SlotInfo) -> bool:
    """Whether a slot is in one of the places that the job has left."""
    return any(place.covers(info) for place in left)


def room_without(nodes: Sequence[Node], request: WorkerRequest, left: Sequence[LeftPlace]) -> int:
    """How many workers fit on the cluster beside the places that were left. ``nodes`` are named by Ray's ids."""
    hosts = {place.node for place in left if not place.gpu}
    gpus = {(place.node, place.gpu) for place in left if place.gpu}
    room = 0
    for node in nodes:
        bad = sum(where == node.name for where, _ in gpus)
        room += 0 if node.name in hosts else count_fitting(node.cpus, max(0.0, node.gpus - bad), request)
    return room


def shortage_without(left: Sequence[LeftPlace], room: int, least: int) -> str:
    """Why a job cannot go on without the places that it has left, and what to do; empty where it can."""
    if room >= least:
        return ""
    lost = "; ".join(f"{place.words} ({place.reason})" for place in left)
    smaller = f", or use cluster.min_workers={room}" if room else ""
    fits = f"only {room} worker{'s' if room > 1 else ''} fit" if room else "no worker fits"
    return f"giving up: without {lost} {fits} on the cluster, and {least} are needed: {left[-1].cure}{smaller}"


def in_a_row(past: Sequence[Failure], new: Failure) -> list[Failure]:
    """The failures since there was progress, of which ``new`` is the last."""
    progress = past and (new.step > past[-1].step or new.saved > past[-1].saved)
    return [new] if progress else [*past, new]


def decide(row: Sequence[Failure], allowed: int, left: LeftPlace | None = None, shortage: str = "") -> Decision:
    """The decision after the last failure of ``row``, of which the first ``allowed`` are answered by a restart.

    ``left``: the place that is left for it. ``shortage``: why the job cannot go on without the places it has left.
    """
    new, tries = row[-1], len(row)
    if shortage:
        return Decision(False, shortage)
    if new.fault not in FROM_OUTSIDE and row[:-1] and (row[-2].signature, row[-2].step) == (new.signature, new.step):
        return Decision(
            False, "giving up: it failed twice in the same way at the same step, so a restart does not help"
        )
    if tries > allowed:
        limit = f"giving up: cluster.max_failures={allowed} restarts in a row made no progress" if allowed else ""
        return Decision(False, limit or "giving up: cluster.max_failures=0 allows no restart")
    wait = min(LONGEST_WAIT_S, 2.0 ** (tries - 2)) if tries > 1 else 0.0
    start = (
        f"from the checkpoint of step {new.saved}" if new.saved else "from the beginning: there is no checkpoint yet"
    )
    after = f" in {wait:.0f} s" if wait else ""
    without = f" without {left.words}" if left else ""
    count = f"(restart {tries} of {allowed} without progress)"
    return Decision(True, f"starting again{after}{without} {start} {count}", wait)
