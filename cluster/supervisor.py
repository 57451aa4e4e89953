"""The life of a job: stewards are placed, a world is started, its news shown, its end judged; if it failed, again."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import watch
from cluster.job import Job
from cluster.steward import Steward
from cluster.world import HEAR_S, World, ask
from train.errors import UserError


class Supervisor:
    """Runs a job on the joined Ray cluster."""

    def __init__(self, job: Job, device: str) -> None:
        self.job = job
        self.device = device
        self.generation = 0
        self.stewards: list[Any] = []
        self.places: list[dict[str, Any]] = []
        self.group: Any = None

    def run(self) -> watch.Verdict:
        """Starts worlds until one is done, stopped, or failed once more than ``cluster.max_failures`` allows."""
        self.place()
        failures = 0
        while True:
            verdict = self.run_world()
            if verdict.kind != "failed":
                return verdict
            failures += 1
            left = self.job.config.cluster.max_failures - failures
            last = left < 0 or self.job.signals.heard is not None
            plan_ = None if last else f"starting again from the newest checkpoint (restart {failures} of {failures + left})"
            self.job.show({"event": "failure", "lines": watch.explain(verdict), "next": plan_})
            if last:
                return verdict
            self.generation += 1
            self._replace_lost()

    def place(self) -> None:
        """Reserves the workers' places all at once and puts a steward on each; ranks go node by node."""
        cluster = self.job.config.cluster
        bundle = {"CPU": float(cluster.cpus_per_worker)}
        if self.device == "gpu":
            bundle["GPU"] = 1.0
        self.group = placement_group([bundle] * cluster.workers, strategy="PACK")
        deadline = time.monotonic() + cluster.start_timeout
        while not self.group.wait(HEAR_S):
            if time.monotonic() > deadline:
                raise UserError(
                    f"no room for {cluster.workers} workers within cluster.start_timeout={cluster.start_timeout} s: "
                    "other jobs hold the cluster. Wait for them, ask for fewer cluster.workers, or wait longer"
                )
        self.stewards = [self._steward(bundle, index) for index in range(cluster.workers)]
        places = ask([s.where.remote() for s in self.stewards], cluster.start_timeout)
        by_node = sorted(range(len(places)), key=lambda i: (places[i]["ip"], places[i]["node"], i))
        self.stewards = [self.stewards[i] for i in by_node]
        self.places = [places[i] for i in by_node]
        self.job.clock.mark("workers")

    def _steward(self, bundle: dict[str, float], index: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        actor = ray.remote(Steward).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=strategy,
            max_concurrency=4,  # a steward answers while somebody waits for its news
        )
        return actor.remote(self.job.folder, self.job.target, self.device)

    def _replace_lost(self) -> None:
        """Puts new stewards where a steward or its host was lost."""
        alive = []
        for steward in self.stewards:
            try:
                ray.get(steward.where.remote(), timeout=HEAR_S * 10)
                alive.append(True)
            except ray.exceptions.RayError:
                alive.append(False)
        if not all(alive):
            self.release()
            self.place()

    def release(self) -> None:
        """Ends the stewards and gives their places back."""
        for steward in self.stewards:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(steward)
        self.stewards = []
        if self.group is not None:
            ray.util.remove_placement_group(self.group)

    def run_world(self) -> watch.Verdict:
        """One start of all ranks, to the end of all of them."""
        world = World(self.job, self.stewards, self.places, self.generation)
        world.start(self.orders())
        self.job.signals.running()
        return world.follow()

    def orders(self) -> list[dict[str, Any]]:
        """What each rank's steward needs to start its trainer, but where they meet."""
        config, size = self.job.config, len(self.stewards)
        text = config.model_dump_json(by_alias=True)
        seen: dict[str, int] = {}
        orders = []
        for rank, place in enumerate(self.places):
            local = seen.setdefault(place["node"], 0)
            seen[place["node"]] += 1
            orders.append(
                {
                    "job": self.job.folder,
                    "rank": rank,
                    "size": size,
                    "local_rank": local,
                    "config": text,
                    "corpus": self.job.corpus,
                    "cwd": str(Path.cwd()),
                    "log": str(self.job.run_dir / "logs" / f"rank_{rank}.log"),
                    "threads": config.cluster.cpus_per_worker,
                    "env": {},
                }
            )
        for order, place in zip(orders, self.places, strict=True):
            order["env"] = self._environment(order, seen[place["node"]])
        return orders

    def _environment(self, order: dict[str, Any], local_size: int) -> dict[str, str]:
        """What torch, DeepSpeed, gloo and NCCL read. A GPU rank sees one device, so its LOCAL_RANK is 0."""
        return {
            "RANK": str(order["rank"]),
            "WORLD_SIZE": str(order["size"]),
            "LOCAL_RANK": "0" if self.device == "gpu" else str(order["local_rank"]),
            "LOCAL_WORLD_SIZE": str(local_size),
            "LOCAL_SIZE": str(local_size),
            "OMP_NUM_THREADS": str(order["threads"]),
        }
