"""GPUs and hosts that a job leaves because of a fault of the device, and what that leaves of the cluster; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.device_health.device_fault import DeviceFault
from cluster.raycluster.placement import Node, WorkerRequest, count_fitting
from cluster.worker.messages import SlotInfo
from train.util.format import plural


@dataclass(frozen=True)
class LeftPlace:
    """A GPU, or a whole host, that a job does not use any more because of a fault of the device."""

    node: str
    """Ray's id of the host: one that joins again has another, as it was restarted meanwhile. Empty where Ray itself was
    started anew and the hosts were not: then the host's name counts.
    """
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
        same_host = self._is_host(info.node, info.host)
        return self.gpu in info.gpus and same_host if self.gpu else same_host

    def lies_on(self, node: Node) -> bool:
        """Whether it is a node, or a GPU of it."""
        return self._is_host(node.id, node.name)

    def by_host_name(self) -> LeftPlace:
        """The place on a new cluster of the same hosts, which have other ids."""
        return replace(self, node="")

    def _is_host(self, node: str, host: str) -> bool:
        by_name = self.gpu or not self.node
        return self.node == node or bool(by_name and self.host == host)

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
    """How many workers fit on the cluster beside the places that were left."""
    room = 0
    for node in nodes:
        bad = {place.gpu for place in left if place.lies_on(node)}
        room += 0 if "" in bad else count_fitting(node.cpus, max(0.0, node.gpus - len(bad)), request)
    return room


def shortage_without(left: Sequence[LeftPlace], room: int, least: int) -> str:
    """Why a job cannot go on without the places that it has left, and what to do; empty where it can."""
    if room >= least:
        return ""
    lost = "; ".join(f"{place.words} ({place.reason})" for place in left)
    smaller = f", or use cluster.min_workers={room}" if room else ""
    fits = f"only {plural(room, 'worker')} {'fits' if room == 1 else 'fit'}" if room else "no worker fits"
    needed = f"{least} {'is' if least == 1 else 'are'} needed"
    return f"giving up: without {lost} {fits} on the cluster, and {needed}: {left[-1].cure}{smaller}"
