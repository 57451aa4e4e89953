"""Where the workers go: pure arithmetic over what the nodes have, or the reason why not, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.errors import UserError


@dataclass(frozen=True)
class Node:
    """One machine of the cluster: all it has, and what nobody uses now. Cores and GPUs."""

    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class WorkerRequest:
    """What a job asks for: so many workers of so many cores and GPUs each, between which nothing is split."""

    workers: int
    cpus: int
    gpus: int
    least: int | None = None
    """So many are enough to begin with; None: all."""

    @property
    def each(self) -> str:
        """One worker's share, in words."""
        gpus = f" and {_count(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{_count(self.cpus, 'core')}{gpus}"


@dataclass(frozen=True)
class Placement:
    """Workers per node, by name, as they would be packed now; ``waiting``: how many must wait for others to end, or, where
    fewer are enough, for more nodes.
    """

    workers: dict[str, int]
    waiting: int


def choose_device(asked: str, nodes: Sequence[Node]) -> str:
    """ "cpu" or "gpu": what ``cluster.device`` means on these nodes. Raises UserError where GPUs are asked for and none
    is.
    """
    any_gpu = any(node.gpus for node in nodes)
    if asked == "gpu" and not any_gpu:
        raise UserError(
            "cluster.device=gpu, but no node has a GPU: use cluster.device=cpu, or join a cluster that has some"
        )
    return ("gpu" if any_gpu else "cpu") if asked == "auto" else asked


def place_workers(nodes: Sequence[Node], request: WorkerRequest) -> Placement:
    """Packs the workers on the nodes. Raises UserError when they cannot fit even when nobody else uses the cluster."""
    room = {node.name: _fits(node.cpus, node.gpus, request) for node in nodes}
    if sum(room.values()) < (request.least or request.workers):
        raise UserError(_too_few(nodes, request, room))
    placed: dict[str, int] = {}
    left = request.workers
    free = {node.name: _fits(node.free_cpus, node.free_gpus, request) for node in nodes}
    for name in sorted(free, key=lambda name: -free[name]):
        here = min(left, free[name])
        if here:
            placed[name] = here
        left -= here
    return Placement(placed, left)


def initial_workers(placement: Placement, request: WorkerRequest) -> int:
    """With how many workers to begin: all, or as many as there is room for now where that is enough."""
    return max(sum(placement.workers.values()), request.least or request.workers)


def _fits(cpus: float, gpus: float, request: WorkerRequest) -> int:
    by_cpu = int(cpus // request.cpus)
    return min(by_cpu, int(gpus // request.gpus)) if request.gpus else by_cpu


def _too_few(nodes: Sequence[Node], request: WorkerRequest, room: dict[str, int]) -> str:
    total = sum(room.values())
    key, least = ("min_workers", request.least) if request.least else ("workers", request.workers)
    lines = [
        f"cluster.{key}={least} asks for {least} workers of {request.each}; "
        + (f"only {total} fit:" if total else "none fits:")
    ]
    for node in nodes:
        has = f"{_count(node.cpus, 'core')}, {_count(node.gpus, 'GPU')}"
        lines.append(f"  {node.name}: {has}: room for {room[node.name]}{_shortage(node, request)}")
    cures = [f"cluster.{key}={total}"] if total else []
    if request.cpus > 1:
        cures.append("fewer cluster.cpus_per_worker")
    if request.gpus:
        cures.append("cluster.device=cpu")
    cures.append("a cluster with more (cluster.address=HOST:PORT)")
    return "\n".join([*lines, f"Use {', or '.join(cures)}."])


def _shortage(node: Node, request: WorkerRequest) -> str:
    """What one more worker would need on a node, in words."""
    after = _fits(node.cpus, node.gpus, request) + 1
    cpus = after * request.cpus - node.cpus
    gpus = after * request.gpus - node.gpus
    missing = [_count(n, unit) for n, unit in ((cpus, "core"), (gpus, "GPU")) if n > 0]
    return f", {' and '.join(missing)} short of another"


def _count(number: float, unit: str) -> str:
    return f"{number:g} {unit}{'' if number == 1 else 's'}"
