"""The slots of a job's workers on the Ray cluster: kept over restarts, refilled when lost.

A slot is a bundle of a placement group with an agent in it. Ray itself gives a bundle another node when its own is gone
and another has room, so a slot that was lost is only asked for a new agent: it answers as soon as there is room again.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.raycluster import status
from cluster.raycluster.placement import WorkerRequest
from cluster.supervision.job import Job
from cluster.supervision.left_places import LeftPlace, is_left, room_without, shortage_without
from cluster.supervision.timeouts import REJOIN_S, SLOT_CHECK_S, TICK_S
from cluster.worker.agent import WorkerAgent
from cluster.worker.messages import SlotInfo
from train.config.schema import ClusterConfig
from train.errors import UserError
from train.util.format import plural

AGENT_ANSWER_S = 5.0
"""How long an agent may take to answer after a failed start before it is counted as lost."""
RAYLET_CONNECT_S = 1.0
"""How long the raylet of a node may take to accept a connection."""
GATHER_S = 0.0005
"""How long the driver waits for further answers, for each agent that it has not heard."""


def take_ready(polls: list[Any], patience_s: float) -> list[Any]:
    """All of the agents' answers that are there, after waiting at most so long for the first of them.

    After the first, others are waited for a moment that grows with their number, so that the work of a look at all
    polls is done some ten times a second and not once an answer.
    """
    first, _ = ray.wait(polls, num_returns=1, timeout=patience_s, fetch_local=True)
    if not first:
        return []
    return ray.wait(polls, num_returns=len(polls), timeout=min(GATHER_S * (len(polls) - 1), TICK_S), fetch_local=True)[
        0
    ]


def _bundle(cluster: ClusterConfig, device: str) -> dict[str, float]:
    return {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if device == "gpu" else {})


def rank_order(infos: Sequence[SlotInfo]) -> list[int]:
    """The positions of slots in the order of their ranks: host by host, and on each by its GPUs' indices or UUIDs.

    So a rank has the same GPU and the same neighbours in NCCL's rings at each start, whichever slot came up first.
    """

    def place(n: int) -> tuple[object, ...]:
        info = infos[n]
        return info.ip, info.node, [(len(gpu), gpu) for gpu in info.gpus], n  # GPU 2 before GPU 10

    return sorted(range(len(infos)), key=place)


@dataclass
class Slot:
    """One worker's share of the cluster, and the agent in it."""

    group: Any
    """Ray's placement group that the slot is a bundle of."""
    index: int
    bundle: dict[str, float]
    """Resources that Ray reserves for the slot."""
    agent: Any = None
    pending_info: Any = None
    """The open question to the agent for its ``info``."""
    info: SlotInfo | None = None
    """The agent's answer: from then on the slot is up."""
    up_since: float = 0.0
    """When the agent answered (monotonic)."""
    empty_until: float = 0.0
    """When another agent may be asked for (monotonic)."""
    kill: Callable[[Any], None] = ray.kill
    """Ends its agent."""

    def vacate(self, seconds: float = 0.0) -> None:
        """Ends its agent, and leaves the slot empty for so many seconds."""
        if self.agent is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                self.kill(self.agent)
        self.agent = self.pending_info = self.info = None
        self.empty_until = time.monotonic() + seconds


def request_gang(cluster: ClusterConfig, device: str, size: int, left: Sequence[LeftPlace] = ()) -> list[Slot]:
    """Asks Ray for slots of ``size`` workers, all of them or none; they are there once ``gang_is_placed``.

    None is on a host of ``left``. Of a GPU in it, its slot keeps hold, so that Ray gives another.
    """
    bundle = _bundle(cluster, device)
    hosts = sorted({place.node for place in left if place.node and not place.gpu})
    labels = [{"ray.io/node-id": f"!in({','.join(hosts)})"}] * size if hosts else None
    group = placement_group([bundle] * size, strategy="PACK", bundle_label_selector=labels)
    return [Slot(group, index, bundle) for index in range(size)]


def gang_fits(gang: Sequence[Slot], cluster: ClusterConfig, device: str) -> bool:
    """Whether the slots are as many and as large as a job's workers need."""
    return [slot.bundle for slot in gang] == [_bundle(cluster, device)] * cluster.worker_count


def gang_hosts(gang: Sequence[Slot]) -> list[str]:
    """The host name of each slot of a placed gang."""
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    nodes = [placement_group_table(slot.group)["bundles_to_node_id"][slot.index] for slot in gang]
    return [names.get(node, "a lost host") for node in nodes]


def gang_is_placed(gang: Sequence[Slot]) -> bool:
    """Whether Ray has reserved all slots of a gang."""
    return all(placement_group_table(group)["state"] == "CREATED" for group in _groups(gang))


def release_gang(gang: Sequence[Slot]) -> None:
    """Ends the agents and gives the slots back to Ray, or withdraws the request for them."""
    for slot in gang:
        slot.vacate()
    for group in _groups(gang):
        ray.util.remove_placement_group(group)


def _groups(gang: Sequence[Slot]) -> list[Any]:
    return list({slot.group.id: slot.group for slot in gang}.values())


class JobSlots:
    """All slots of a job, ``cluster.workers`` of them; an attempt runs on those that are up."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device
        self.all: list[Slot] = []
        self.left: list[LeftPlace] = []
        """GPUs and hosts with a fault: their slots stay empty, and others are asked for."""
        cluster = job.config.cluster
        self.min_workers = cluster.min_workers or cluster.worker_count

    def node_lives(self, node: str) -> bool:
        """Whether the node of that id lives. Ray may know a quarter of a minute late, so its raylet's port is tried."""
        known = next((known for known in ray.nodes() if known["NodeID"] == node and known["Alive"]), None)
        with contextlib.suppress(OSError):
            if known is not None:
                address = known["NodeManagerAddress"], known["NodeManagerPort"]
                socket.create_connection(address, RAYLET_CONNECT_S).close()
                return True
        return False

    def node_resources(self) -> dict[str, dict[str, float]]:
        """All that the nodes have, by their ids."""
        return {node["NodeID"]: node["Resources"] for node in ray.nodes()}

    def reserve_slots(self, size: int, gang: Sequence[Slot] = ()) -> None:
        """Reserves ``size`` slots at once, or takes over ``gang``, and starts agents where there are none.

        The other slots, up to ``cluster.workers``, are requested one by one. UserError when there is no room in time.
        Beside the places that were left there may be room for fewer, with which the job goes on; UserError where these
        are less than ``min_workers``.
        """
        cluster = self.job.config.cluster
        self.release_slots()
        if self.left:
            if shortage := self.shortage():
                raise UserError(shortage)
            size = min(size, self.room())
        self.all = [*(gang or request_gang(cluster, self.device, size, self.left))]
        for _ in range(cluster.worker_count - size):
            self.all += request_gang(cluster, self.device, 1, self.left)
        for slot in self.all:
            if slot.info is None:
                self._start_agent(slot)
        self.wait_for_slots(size, size, cluster.start_timeout)
        self.job.clock.mark("workers")

    def hand_over_slots(self) -> list[Slot]:
        """Gives all slots with their agents away, for another job; none where an agent is missing."""
        given = self.all if len(self.up_slots()) == len(self.all) else []
        self.all = [] if given else self.all
        return given

    def wait_for_slots(self, least: int, wished: int, seconds: float) -> None:
        """Waits until ``wished`` slots are up, or ``least`` once ``REJOIN_S`` are over. UserError after ``seconds``."""
        began, private = time.monotonic(), self.job.private
        while len(self.up_slots()) < wished and not self.job.stop.requested:
            if private is not None:
                private.check()
            waited, up = time.monotonic() - began, len(self.up_slots())
            if up >= least and waited > REJOIN_S:
                return
            if waited > seconds:
                raise UserError(
                    f"no room for {plural(least, 'worker')} within cluster.start_timeout={seconds:.0f} s, "
                    f"only for {up}: other jobs hold the cluster, or hosts are gone. Wait for them, ask for fewer "
                    "cluster.workers, set cluster.min_workers, or wait longer"
                )
            self.update_slots(SLOT_CHECK_S)

    def update_slots(self, seconds: float = 0.0) -> None:
        """Notes which agents have come up, waiting up to ``seconds`` for one; starts agents in slots due for one."""
        for slot in self.all:
            if slot.agent is None and time.monotonic() > slot.empty_until:
                self._start_agent(slot)
        waiting = {slot.pending_info: slot for slot in self.all if slot.pending_info is not None}
        if not waiting and seconds:
            time.sleep(seconds)
        nodes = {slot.info.node for slot in self.all if slot.info is not None}
        for question in take_ready(list(waiting), seconds) if waiting else ():
            slot = waiting[question]
            slot.pending_info = None
            try:
                slot.info, slot.up_since = ray.get(question), time.monotonic()
                if is_left(self.left, slot.info):
                    self._replace(slot)
                    continue
                if slot.info.node not in nodes:  # one of a host's agents has its fork server begin to import
                    slot.agent.start_fork_server.remote()
                    nodes.add(slot.info.node)
            except ray.exceptions.RayError:
                self._start_agent(slot)

    def leave(self, place: LeftPlace) -> None:
        """Empties the slots in a place for good, and asks for as many elsewhere."""
        self.left.append(place)
        for slot in list(self.all):
            if slot.info is not None and place.covers(slot.info):
                self._replace(slot)

    def _replace(self, slot: Slot) -> None:
        """Leaves a slot empty for good, without giving it back to Ray, which would hand out the same GPU again."""
        slot.vacate(math.inf)
        self.all += request_gang(self.job.config.cluster, self.device, 1, self.left)
        self._start_agent(self.all[-1])

    def room(self) -> int:
        """How many workers of the job fit on the cluster, whoever uses it now, beside the places that were left."""
        bundle = _bundle(self.job.config.cluster, self.device)
        request = WorkerRequest(self.job.config.cluster.worker_count, int(bundle["CPU"]), int(bundle.get("GPU", 0)))
        return room_without(status.living_nodes(), request, self.left)

    def shortage(self) -> str:
        """Why the job cannot go on without the places that it has left, and what to do; empty where it can."""
        return shortage_without(self.left, self.room(), self.min_workers)

    def up_slots(self) -> list[Slot]:
        """The slots that are up, in the order of ranks."""
        up = [(slot, slot.info) for slot in self.all if slot.info is not None]
        order = rank_order([info for _, info in up])
        return [up[n][0] for n in order]

    def count_settled(self, seconds: float) -> int:
        """How many slots have been up for at least so many seconds."""
        return sum(slot.info is not None and time.monotonic() - slot.up_since >= seconds for slot in self.all)

    def find_silent(self, slots: Sequence[Slot]) -> set[int]:
        """The positions in ``slots`` of those whose agents do not answer."""
        questions = {slot.agent.describe_slot.remote(): n for n, slot in enumerate(slots)}
        answered, rest = ray.wait(list(questions), num_returns=len(questions), timeout=AGENT_ANSWER_S)
        silent = {questions[question] for question in rest}
        for question in answered:
            try:
                ray.get(question)
            except ray.exceptions.RayError:
                silent.add(questions[question])
        return silent

    def release_slots(self) -> None:
        """Ends all agents and gives the slots back to Ray."""
        release_gang(self.all)
        self.all = []

    def _start_agent(self, slot: Slot) -> None:
        """Asks Ray for an agent in the slot. It comes up when the slot has a node."""
        strategy = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.index)
        actor = ray.remote(WorkerAgent).options(
            num_cpus=slot.bundle["CPU"],
            num_gpus=slot.bundle.get("GPU", 0),
            scheduling_strategy=strategy,
            max_concurrency=4,  # an agent answers while a poll waits for its events
        )
        slot.agent = actor.remote(self.job.folder, self.job.target, self.device)
        slot.info, slot.pending_info = None, slot.agent.describe_slot.remote()
