"""How many workers fit on which nodes, or why they do not: pure arithmetic before Ray is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.errors import UserError
from train.util.format import plural

CPU_WORKERS = 2
"""Workers of a job that says nothing of them, where there is no GPU: the fewest that divide the work."""


@dataclass(frozen=True)
class Node:
    """Cores and GPUs of one machine of the cluster: all that it has, and what is free now."""

    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    id: str = ""
    """Ray's, once it is up."""


@dataclass(frozen=True)
class WorkerRequest:
    """The workers of a job, each with so many cores and GPUs of one node."""

    workers: int
    cpus: int
    gpus: int
    least: int | None = None
    """Workers with which the job may begin; None: all."""

    @property
    def each(self) -> str:
        """Cores and GPUs of one worker, in words."""
        gpus = f" and {_count(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{_count(self.cpus, 'core')}{gpus}"


@dataclass(frozen=True)
class Placement:
    """Workers per node, by name, as they would be packed now.

    ``waiting``: workers for which there is no room until other jobs end or, beyond ``least``, more nodes join.
    """

    workers: dict[str, int]
    waiting: int


def choose_device(asked: str, nodes: Sequence[Node]) -> str:
    """The device, "cpu" or "gpu", that ``cluster.device`` means on these nodes.

    UserError where GPUs are asked for and no node has one.
    """
    any_gpu = any(node.gpus for node in nodes)
    if asked == "gpu" and not any_gpu:
        raise UserError(
            "cluster.device=gpu, but no node has a GPU: use cluster.device=cpu, or join a cluster that has some"
        )
    return ("gpu" if any_gpu else "cpu") if asked == "auto" else asked


def default_workers(nodes: Sequence[Node], device: str, cpus_per_worker: int) -> int:
    """Workers of a job that leaves ``cluster.workers`` out: one a GPU of the cluster; on CPUs two, where they fit.

    GPUs that others hold are not counted, unless they hold all: then the job waits for these.
    """
    request = WorkerRequest(CPU_WORKERS, cpus_per_worker, int(device == "gpu"))
    room = sum(count_fitting(node.cpus, node.gpus, request) for node in nodes)
    free = sum(count_fitting(node.free_cpus, node.free_gpus, request) for node in nodes)
    return max(1, (free or room) if device == "gpu" else min(CPU_WORKERS, room))


def describe_held_gpus(nodes: Sequence[Node], workers: int, holders: Sequence[object]) -> str:
    """Why a job that leaves ``cluster.workers`` out has fewer than the cluster has GPUs; empty where none is held."""
    gpus = int(sum(node.gpus for node in nodes))
    free = int(sum(node.free_gpus for node in nodes))
    if free in (0, gpus):
        return ""
    held_by = "; ".join(map(str, holders)) or "others"
    taken = f"cluster.workers is not set: the job takes {workers} of the {plural(gpus, 'GPU')} of the cluster"
    return f"{taken}, as {gpus - free} {'is' if gpus - free == 1 else 'are'} held: {held_by}"


def threads_per_worker(device: str, cpus_per_worker: int, cpus: float, gpus: float) -> int:
    """Threads of a worker on a node of so many cores and GPUs: the cores it asks for, or its GPU's share of them all.

    The other cores of a machine with GPUs have nothing to do, and an optimizer that is offloaded needs them.
    """
    return max(cpus_per_worker, int(cpus // gpus)) if device == "gpu" and gpus else cpus_per_worker


def place_workers(nodes: Sequence[Node], request: WorkerRequest) -> Placement:
    """Packs the workers on the nodes. UserError where they cannot fit even if nobody else uses the cluster."""
    capacity = {node.name: count_fitting(node.cpus, node.gpus, request) for node in nodes}
    if sum(capacity.values()) < (request.least or request.workers):
        raise UserError(_explain_shortage(nodes, request, capacity))
    placed: dict[str, int] = {}
    left = request.workers
    free = {node.name: count_fitting(node.free_cpus, node.free_gpus, request) for node in nodes}
    for name in sorted(free, key=lambda name: -free[name]):
        here = min(left, free[name])
        if here:
            placed[name] = here
        left -= here
    return Placement(placed, left)


def initial_workers(placement: Placement, request: WorkerRequest) -> int:
    """Workers with which to begin: all, or as many as there is room for now where that is enough."""
    return max(sum(placement.workers.values()), request.least or request.workers)


def count_fitting(cpus: float, gpus: float, request: WorkerRequest) -> int:
    """How many of the workers have room on so many cores and GPUs of one node."""
    by_cpu = int(cpus // request.cpus)
    return min(by_cpu, int(gpus // request.gpus)) if request.gpus else by_cpu


def _explain_shortage(nodes: Sequence[Node], request: WorkerRequest, capacity: dict[str, int]) -> str:
    total = sum(capacity.values())
    key, least = ("min_workers", request.least) if request.least else ("workers", request.workers)
    lines = [
        f"cluster.{key}={least} asks for {least} workers of {request.each}; "
        + (f"only {total} fit:" if total else "none fits:")
    ]
    for node in nodes:
        has = f"{_count(node.cpus, 'core')}, {_count(node.gpus, 'GPU')}"
        lines.append(f"  {node.name}: {has}: room for {capacity[node.name]}{_missing_for_another(node, request)}")
    cures = [f"cluster.{key}={total}"] if total else []
    if request.cpus > 1:
        cures.append("fewer cluster.cpus_per_worker")
    if request.gpus:
        cures.append("cluster.device=cpu")
    cures.append("a cluster with more (cluster.address=HOST:PORT)")
    return "\n".join([*lines, f"Use {', or '.join(cures)}."])


def _missing_for_another(node: Node, request: WorkerRequest) -> str:
    """Cores and GPUs that a node lacks for one more worker, in words."""
    workers = count_fitting(node.cpus, node.gpus, request) + 1
    cpus = workers * request.cpus - node.cpus
    gpus = workers * request.gpus - node.gpus
    missing = [_count(n, unit) for n, unit in ((cpus, "core"), (gpus, "GPU")) if n > 0]
    return f", {' and '.join(missing)} short of another"


def _count(number: float, unit: str) -> str:
    return f"{number:g} {unit}{'' if number == 1 else 's'}"
