"""The places of a job's workers on the Ray cluster: taken all at once, kept over restarts, asked for again where lost.

A slot is a bundle of a placement group with a steward in it. Ray itself gives a bundle another node when its own is gone and
another has room, so a slot that was lost is only asked for a new steward: it answers as soon as there is room again.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.supervision.job import Job
from cluster.worker.agent import WorkerAgent
from train.config.schema import ClusterConfig
from train.errors import UserError

REJOIN_S = 8.0
"""How long a lost worker's place on a host that lives may take to be filled again, before the others go on without it."""
LOOK_S, ANSWER_S, KNOCK_S = 0.2, 5.0, 1.0


def _bundle(cluster: ClusterConfig, device: str) -> dict[str, float]:
    return {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if device == "gpu" else {})


def lives(node: str) -> bool:
    """Whether the node of that id lives. Ray's word for it may be a quarter of a minute old, so its raylet's port is tried too."""
    found = next((known for known in ray.nodes() if known["NodeID"] == node and known["Alive"]), None)
    with contextlib.suppress(OSError):
        if found is not None:
            socket.create_connection((found["NodeManagerAddress"], found["NodeManagerPort"]), KNOCK_S).close()
            return True
    return False


@dataclass
class Slot:
    """One worker's place."""

    group: Any
    index: int
    bundle: dict[str, float]
    """What Ray keeps for it."""
    agent: Any = None
    asked: Any = None
    """The question where the steward is, while it is open."""
    info: dict[str, Any] | None = None
    """Its answer: the steward is up."""
    since: float = 0.0
    """When it answered (monotonic)."""
    empty_until: float = 0.0

    def empty(self, seconds: float = 0.0) -> None:
        """Gives up its steward, and asks for another when ``seconds`` are over."""
        if self.agent is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self.agent)
        self.agent = self.asked = self.info = None
        self.empty_until = time.monotonic() + seconds


def gang(cluster: ClusterConfig, device: str, size: int) -> list[Slot]:
    """Asks Ray for so many workers' places, all of them or none; they are there once ``placed``."""
    bundle = _bundle(cluster, device)
    group = placement_group([bundle] * size, strategy="PACK")
    return [Slot(group, index, bundle) for index in range(size)]


def fits(places: Sequence[Slot], cluster: ClusterConfig, device: str) -> bool:
    """Whether places are what a job's workers ask for."""
    return [slot.bundle for slot in places] == [_bundle(cluster, device)] * cluster.workers


def hosts(places: Sequence[Slot]) -> list[str]:
    """The names of the hosts of places that are there."""
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    found = [placement_group_table(slot.group)["bundles_to_node_id"][slot.index] for slot in places]
    return [names.get(node, "a lost host") for node in found]


def placed(places: Sequence[Slot]) -> bool:
    """Whether a gang has its places."""
    return all(placement_group_table(group)["state"] == "CREATED" for group in _groups(places))


def give_up(places: Sequence[Slot]) -> None:
    """Ends the stewards and gives the places back, or takes the wish for them back."""
    for slot in places:
        slot.empty()
    for group in _groups(places):
        ray.util.remove_placement_group(group)


def _groups(places: Sequence[Slot]) -> list[Any]:
    return list({slot.group.id: slot.group for slot in places}.values())


class JobSlots:
    """All slots of a job, ``cluster.workers`` of them; those that are up make the world."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device
        self.all: list[Slot] = []
        cluster = job.config.cluster
        self.least = cluster.min_workers or cluster.workers

    def take(self, size: int, places: Sequence[Slot] = ()) -> None:
        """Reserves ``size`` places at once, or has ``places``, and fills those without a steward; the others up to
        ``cluster.workers`` are asked for one by one.

        Raises UserError when there is no room in time.
        """
        cluster = self.job.config.cluster
        self.release()
        self.all = [*(places or gang(cluster, self.device, size))]
        for _ in range(cluster.workers - size):
            self.all += gang(cluster, self.device, 1)
        for slot in self.all:
            if slot.info is None:
                self._ask(slot)
        self.wait(size, size, cluster.start_timeout)
        self.job.clock.mark("workers")

    def hand_over(self) -> list[Slot]:
        """All places with their stewards, for another job, and no longer this one's; none where a steward is missing."""
        found = self.all if len(self.up()) == len(self.all) else []
        self.all = [] if found else self.all
        return found

    def wait(self, least: int, wished: int, seconds: float) -> None:
        """Waits until ``wished`` slots are up, or at least ``least`` once ``REJOIN_S`` are over. UserError after ``seconds``."""
        began, private = time.monotonic(), self.job.private
        while len(self.up()) < wished and self.job.signals.heard is None:
            if private is not None:
                private.check()
            waited = time.monotonic() - began
            if len(self.up()) >= least and waited > REJOIN_S:
                return
            if waited > seconds:
                raise UserError(
                    f"no room for {least} workers within cluster.start_timeout={seconds:.0f} s, only for {len(self.up())}: "
                    "other jobs hold the cluster, or hosts are gone. Wait for them, ask for fewer cluster.workers, "
                    "set cluster.min_workers, or wait longer"
                )
            self.look(LOOK_S)

    def look(self, seconds: float = 0.0) -> None:
        """Notes which of the open questions were answered, and asks again for slots that were to stay empty for a while."""
        for slot in self.all:
            if slot.agent is None and time.monotonic() > slot.empty_until:
                self._ask(slot)
        waiting = {slot.asked: slot for slot in self.all if slot.asked is not None}
        answered = ray.wait(list(waiting), num_returns=1, timeout=seconds)[0] if waiting else []
        if not waiting and seconds:
            time.sleep(seconds)
        for question in answered:
            slot = waiting[question]
            slot.asked = None
            try:
                slot.info, slot.since = ray.get(question), time.monotonic()
                slot.agent.warm_up.remote()
            except ray.exceptions.RayError:
                self._ask(slot)

    def up(self) -> list[Slot]:
        """The slots that are up, in the order of ranks: node by node."""
        found = [
            (slot.info["ip"], slot.info["node"], n, slot) for n, slot in enumerate(self.all) if slot.info is not None
        ]
        return [slot for *_, slot in sorted(found, key=lambda row: row[:3])]

    def settled(self, seconds: float) -> int:
        """How many slots have been up for so many seconds."""
        return sum(slot.info is not None and time.monotonic() - slot.since >= seconds for slot in self.all)

    def silent(self, slots: Sequence[Slot]) -> set[int]:
        """The places in ``slots`` of those whose stewards do not answer."""
        questions = {slot.agent.where.remote(): n for n, slot in enumerate(slots)}
        answered, rest = ray.wait(list(questions), num_returns=len(questions), timeout=ANSWER_S)
        found = {questions[question] for question in rest}
        for question in answered:
            try:
                ray.get(question)
            except ray.exceptions.RayError:
                found.add(questions[question])
        return found

    def release(self) -> None:
        """Ends the stewards and gives their places back."""
        give_up(self.all)
        self.all = []

    def _ask(self, slot: Slot) -> None:
        """Asks Ray for a steward in the slot. It comes up when the slot has a node."""
        strategy = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.index)
        actor = ray.remote(WorkerAgent).options(
            num_cpus=slot.bundle["CPU"],
            num_gpus=slot.bundle.get("GPU", 0),
            scheduling_strategy=strategy,
            max_concurrency=4,  # a steward answers while somebody waits for its news
        )
        slot.agent = actor.remote(self.job.folder, self.job.target, self.device)
        slot.info, slot.asked = None, slot.agent.where.remote()
