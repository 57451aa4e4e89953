"""The state of a Ray cluster: its living nodes, what is free on them, and the jobs that hold the rest.

It can be read without joining the cluster.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.raycluster import cluster_client, ray_auth, ray_internals
from cluster.raycluster.placement import Node
from cluster.raycluster.ray_internals import GlobalState
from train.util.format import plural

JOB_DIGITS = 8
"""Last digits of a placement group's id, which are the id of the job that made it."""
NAME_CHARACTERS = 60
"""Characters shown of a job's name: for a driver that is not ours it is the whole command line."""
UNITS = {"CPU": "core", "GPU": "GPU"}


@dataclass(frozen=True)
class NodeLocation:
    """Address of a node, and whether it is the cluster's head."""

    address: str
    head: bool


@dataclass(frozen=True)
class JobHolding:
    """A job that runs on the cluster, with the resources that it holds on each host, in words."""

    name: str
    host: str
    """On which its driver runs."""
    pid: int
    seconds: float
    """Since its start."""
    holds: dict[str, str]

    def __str__(self) -> str:
        holds = ", ".join(f"{host}: {resources}" for host, resources in self.holds.items())
        return f"{self.name} (pid {self.pid} on {self.host}) holds {holds}"


@dataclass(frozen=True)
class ClusterStatus:
    """Nodes and jobs of a cluster at one moment."""

    address: str
    nodes: list[tuple[Node, NodeLocation]]
    jobs: list[JobHolding]


def read_status(address: str) -> ClusterStatus:
    """The status of the cluster whose head is at ``address``. UserError where none answers."""
    ray_auth.authenticate(None, address)
    cluster_client.open_client(address)
    state = ray_internals.state_of(address)
    locations = [
        NodeLocation(info["NodeManagerAddress"], "node:__internal_head__" in info["Resources"])
        for info in _living_infos(state)
    ]
    return ClusterStatus(address, list(zip(_nodes(state), locations, strict=True)), _holdings(state))


def living_nodes() -> list[Node]:
    """The living nodes of the cluster that this process has joined, with all that they have and what is free now."""
    return _nodes(ray_internals.joined_state())


def job_holdings() -> list[JobHolding]:
    """The jobs that hold something of the cluster that this process has joined."""
    return _holdings(ray_internals.joined_state())


def _nodes(state: GlobalState) -> list[Node]:
    """The living nodes; two of one host name are told apart by their addresses."""
    free = state.available_resources_per_node()
    infos = _living_infos(state)
    names = [info["NodeManagerHostname"] for info in infos]
    nodes = []
    for info in infos:
        total, left = info["Resources"], free.get(info["NodeID"], {})
        name, address = info["NodeManagerHostname"], info["NodeManagerAddress"]
        nodes.append(
            Node(
                name=name if names.count(name) == 1 else f"{name} ({address})",
                cpus=total.get("CPU", 0.0),
                gpus=total.get("GPU", 0.0),
                free_cpus=left.get("CPU", 0.0),
                free_gpus=left.get("GPU", 0.0),
                id=info["NodeID"],
            )
        )
    return nodes


def _living_infos(state: GlobalState) -> list[dict[str, Any]]:
    return [info for info in state.node_table() if info["Alive"]]


def _holdings(state: GlobalState) -> list[JobHolding]:
    both = list(zip(_living_infos(state), _nodes(state), strict=True))
    names = {info["NodeID"]: node.name for info, node in both}
    hosts = {info["NodeManagerAddress"]: node.name for info, node in both}
    groups = [group for group in state.placement_group_table().values() if group["state"] == "CREATED"]
    jobs = [_holding(job, groups, names, hosts) for job in state.job_table() if not job["IsDead"]]
    return [job for job in jobs if job.holds]


def _holding(
    job: dict[str, Any], groups: list[dict[str, Any]], names: dict[str, str], hosts: dict[str, str]
) -> JobHolding:
    """``names``: of nodes by their ids; ``hosts``: the same by their addresses."""
    resources: dict[str, Counter[str]] = {}
    for group in groups:
        if group["placement_group_id"][-JOB_DIGITS:] == job["JobID"]:
            for bundle, node in group["bundles_to_node_id"].items():
                resources.setdefault(names.get(node, "a lost node"), Counter()).update(group["bundles"][bundle])
    return JobHolding(
        job["Entrypoint"][:NAME_CHARACTERS],
        hosts.get(job["DriverIPAddress"], job["DriverIPAddress"]),
        job["DriverPid"],
        time.time() - job["StartTime"] / 1000,
        {name: _in_words(counts) for name, counts in resources.items()},
    )


def _in_words(resources: Counter[str]) -> str:
    return " and ".join(plural(int(n), UNITS.get(kind, kind)) for kind, n in resources.items())
