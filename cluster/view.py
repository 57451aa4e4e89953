"""What a cluster looks like from outside: its nodes, and the jobs that hold them. No job needs to be joined for that."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]

from cluster import nodes
from cluster.plan import Node
from train.words import plural

JOB_DIGITS = 8
"""Of a placement group's id, the last so many say which job made it."""


NAME = 60
"""Characters of a job's name that are shown: of drivers that are not ours it is the command line."""


@dataclass(frozen=True)
class Where:
    """A node's place."""

    address: str
    head: bool


@dataclass(frozen=True)
class Holder:
    """A job that runs on the cluster, and what it holds, in words, by host."""

    name: str
    host: str
    pid: int
    seconds: float
    holds: dict[str, str]


@dataclass(frozen=True)
class View:
    """A cluster at one moment."""

    address: str
    nodes: list[tuple[Node, Where]]
    jobs: list[Holder]


def look(address: str) -> View:
    """The cluster whose head is at ``address``. UserError where none answers."""
    nodes.authenticate(None, address)
    nodes.check(address)
    state = GlobalState()
    state._initialize_global_state(GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False))
    living = [info for info in state.node_table() if info["Alive"]]
    places = [Where(i["NodeManagerAddress"], "node:__internal_head__" in i["Resources"]) for i in living]
    found = nodes.nodes_of(state)
    names = {info["NodeID"]: node.name for info, node in zip(living, found, strict=True)}
    hosts = {where.address: node.name for node, where in zip(found, places, strict=True)}
    groups = [g for g in state.placement_group_table().values() if g["state"] == "CREATED"]
    jobs = [_holder(job, groups, names, hosts) for job in state.job_table() if not job["IsDead"]]
    return View(address, list(zip(found, places, strict=True)), [job for job in jobs if job.holds])


def _holder(job: dict[str, Any], groups: list[dict[str, Any]], names: dict[str, str], hosts: dict[str, str]) -> Holder:
    mine = [group for group in groups if group["placement_group_id"][-JOB_DIGITS:] == job["JobID"]]
    held: dict[str, Counter[str]] = {}
    for group in mine:
        for bundle, node in group["bundles_to_node_id"].items():
            held.setdefault(names.get(node, "a lost node"), Counter()).update(group["bundles"][bundle])
    words = {"CPU": "core", "GPU": "GPU"}
    holds = {name: " and ".join(plural(int(n), words.get(kind, kind)) for kind, n in has.items()) for name, has in held.items()}
    seconds = time.time() - job["StartTime"] / 1000
    return Holder(
        job["Entrypoint"][:NAME], hosts.get(job["DriverIPAddress"], job["DriverIPAddress"]), job["DriverPid"], seconds, holds
    )
