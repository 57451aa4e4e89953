"""What a cluster looks like from outside: its nodes, and the jobs that hold them. No job needs to be joined for that."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray._private.state
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]

from cluster.raycluster import ray_node as nodes
from cluster.raycluster.placement import Node
from train.util.format import plural

JOB_DIGITS = 8
"""Of a placement group's id, the last so many say which job made it."""


NAME = 60
"""Characters of a job's name that are shown: of drivers that are not ours it is the command line."""


@dataclass(frozen=True)
class NodeLocation:
    """A node's place."""

    address: str
    head: bool


@dataclass(frozen=True)
class JobHolding:
    """A job that runs on the cluster, and what it holds, in words, by host."""

    name: str
    host: str
    pid: int
    seconds: float
    holds: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid} on {self.host}) holds " + ", ".join(
            f"{n}: {what}" for n, what in self.holds.items()
        )


@dataclass(frozen=True)
class ClusterStatus:
    """A cluster at one moment."""

    address: str
    nodes: list[tuple[Node, NodeLocation]]
    jobs: list[JobHolding]


def read_status(address: str) -> ClusterStatus:
    """The cluster whose head is at ``address``. UserError where none answers."""
    nodes.authenticate(None, address)
    nodes.check(address)
    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    living = _living(state)
    places = [NodeLocation(i["NodeManagerAddress"], "node:__internal_head__" in i["Resources"]) for i in living]
    found = nodes.nodes_of(state)
    return ClusterStatus(address, list(zip(found, places, strict=True)), _holders(state))


def holders() -> list[JobHolding]:
    """The jobs that hold something of the cluster that this process has joined."""
    return _holders(ray._private.state.state)


def _living(state: Any) -> list[dict[str, Any]]:
    return [info for info in state.node_table() if info["Alive"]]


def _holders(state: Any) -> list[JobHolding]:
    both = list(zip(_living(state), nodes.nodes_of(state), strict=True))
    names = {info["NodeID"]: node.name for info, node in both}
    hosts = {info["NodeManagerAddress"]: node.name for info, node in both}
    groups = [group for group in state.placement_group_table().values() if group["state"] == "CREATED"]
    jobs = [_holder(job, groups, names, hosts) for job in state.job_table() if not job["IsDead"]]
    return [job for job in jobs if job.holds]


def _holder(
    job: dict[str, Any], groups: list[dict[str, Any]], names: dict[str, str], hosts: dict[str, str]
) -> JobHolding:
    mine = [group for group in groups if group["placement_group_id"][-JOB_DIGITS:] == job["JobID"]]
    held: dict[str, Counter[str]] = {}
    for group in mine:
        for bundle, node in group["bundles_to_node_id"].items():
            held.setdefault(names.get(node, "a lost node"), Counter()).update(group["bundles"][bundle])
    words = {"CPU": "core", "GPU": "GPU"}
    holds = {
        name: " and ".join(plural(int(n), words.get(kind, kind)) for kind, n in has.items())
        for name, has in held.items()
    }
    seconds = time.time() - job["StartTime"] / 1000
    return JobHolding(
        job["Entrypoint"][:NAME],
        hosts.get(job["DriverIPAddress"], job["DriverIPAddress"]),
        job["DriverPid"],
        seconds,
        holds,
    )
