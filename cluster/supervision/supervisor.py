"""Supervises a job: reserves its slots, runs an attempt, and runs another where that may help."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from cluster.raycluster import placement
from cluster.supervision import failure_report, outcome, restart_policy
from cluster.supervision.attempt import Attempt
from cluster.supervision.job import Job
from cluster.supervision.left_places import LeftPlace
from cluster.supervision.slots import JobSlots, Slot
from cluster.supervision.timeouts import SIGNAL_GRACE_S, TICK_S
from cluster.worker import worker_env
from cluster.worker.messages import RendezvousAddress, StartOrder
from train.checkpoint import manifest
from train.distributed import determinism
from train.events import FailureEvent, NoteEvent, RecoveredEvent
from train.util.run_layout import RunDir


class Supervisor:
    """Runs a job on the Ray cluster that the driver has joined."""

    slots_class: type[JobSlots] = JobSlots

    def __init__(
        self,
        job: Job,
        device: str,
        size: int | None = None,
        gang: Sequence[Slot] = (),
        left: Sequence[LeftPlace] = (),
    ) -> None:
        """``size``: workers to begin with, by default all. ``gang``: slots reserved already, with or without agents.

        ``left``: GPUs and hosts that had a fault before.
        """
        self.job = replace(job, show=self._show)
        self.console = job.show
        self.device = device
        self.size, self.gang = size or job.config.cluster.worker_count, gang
        self.attempts = 0
        self.slots = self.slots_class(self.job, device)
        self.slots.left = [*left]
        self.failures: list[restart_policy.Failure] = []
        """The failures since there was progress."""
        self.interruption: dict[str, Any] = {}
        """When and why the job stopped training, until the next attempt trains."""

    def run(self) -> outcome.Verdict:
        """Starts attempts until one is done, is stopped on request, or has failed so that another would not help."""
        self.slots.reserve_slots(self.size, self.gang)
        while True:
            if self.job.stop.requested:
                return outcome.Verdict("stopped")
            slots = self.slots.up_slots()[: self.job.config.cluster.worker_count]
            attempt = Attempt(self.job, slots, self.attempts, self.slots.node_lives)
            verdict = self._run_attempt(attempt, slots)
            if verdict.kind == "failed":
                again = self._restart_after_failure(attempt, verdict)
            else:
                again = self._restart_after_stop(attempt, verdict)
            if not again:
                return verdict
            failed = attempt.marks.get("failed", attempt.marks.get("ended"))
            fault = verdict.fault or "more workers"
            self.interruption = {"fault": fault, "failed": failed, "ended": time.time(), **self.interruption}
            self.attempts += 1
            self._prepare_slots(attempt, slots, verdict)

    def _run_attempt(self, attempt: Attempt, slots: list[Slot]) -> outcome.Verdict:
        """Starts an attempt and follows it to its end."""
        try:
            pids = attempt.start(lambda rendezvous: self.make_orders(slots, rendezvous, self.slots.node_resources()))
            self._write_locations(attempt, pids)
        except (RuntimeError, ray.exceptions.RayError) as error:
            if self.job.private is None or not self.job.private.lost():
                for rank in self.slots.find_silent(slots):
                    attempt.ranks[rank].agent_lost = True
            fault: outcome.Fault = "worker lost" if isinstance(error, ray.exceptions.RayError) else "raised"
            first, *rest = str(error).strip().splitlines()
            description = f"the workers could not be started: {first}"
            evidence = tuple(rest[-failure_report.MOST_LINES :])
            return outcome.Verdict("failed", fault, diagnosis=outcome.Diagnosis(fault, None, description, evidence))
        if self.job.signals is not None:
            self.job.signals.training_began()
        return attempt.follow(self._can_grow_from(len(slots)))

    def _write_locations(self, attempt: Attempt, pids: list[int]) -> None:
        """Writes ``world.json``: where each rank runs, for people and tools."""
        ranks = [
            {
                "rank": status.rank,
                "pid": pid,
                "steward": status.host.info.pid,
                "host": status.info.host,
                "ip": status.info.ip,
                "node": status.info.node,
            }
            for status, pid in zip(attempt.ranks, pids, strict=True)
        ]
        partial = self.job.run_dir / ".world.json"
        partial.write_text(json.dumps({"generation": self.attempts, "ranks": ranks}) + "\n", encoding="utf-8")
        partial.replace(RunDir(self.job.run_dir).world)

    # --------------------------------------------------------------------------------------------------------- restarts

    def _restart_after_failure(self, attempt: Attempt, verdict: outcome.Verdict) -> bool:
        """Shows the failure and what follows from it; whether to start again, after the wait that this may take."""
        failure = restart_policy.Failure(
            verdict.fault or "", failure_report.signature(verdict), attempt.furthest_step, self._newest_checkpoint()
        )
        self.failures = restart_policy.in_a_row(self.failures, failure)
        left, shortage = self._leave_device(attempt, verdict)
        decision = restart_policy.decide(self.failures, self.job.config.cluster.max_failures, left, shortage)
        again = decision.again and not self.job.stop.requested
        self.job.show(FailureEvent(failure_report.explain(verdict), decision.message, again).to_json())
        until = time.monotonic() + decision.wait_s
        while again and time.monotonic() < until:
            time.sleep(TICK_S)
            again = not self.job.stop.requested
        return again

    def _leave_device(self, attempt: Attempt, verdict: outcome.Verdict) -> tuple[LeftPlace | None, str]:
        """Leaves the GPU or host whose fault the failure was: that place, and why the job cannot go on without it."""
        fault, cause = verdict.device_fault, verdict.cause
        if fault is None or cause is None:
            return None, ""
        place = LeftPlace.of(attempt.ranks[cause.rank].info, fault)
        self.slots.leave(place)
        return place, self.slots.shortage()

    def _newest_checkpoint(self) -> int:
        """The step of the newest checkpoint, 0 without one; a folder that has its final name is complete."""
        return manifest.newest_step(RunDir(self.job.run_dir).checkpoints)

    def _restart_after_stop(self, attempt: Attempt, verdict: outcome.Verdict) -> bool:
        """Whether an attempt that was stopped and saved is followed by another.

        By a smaller one, where some workers were told to end and the job was not; by a larger one, where it was stopped
        for that.
        """
        if verdict.kind != "stopped" or self.job.stop.requested:
            return False
        if attempt.state.stopping:
            return True
        if verdict.fault != "preempted" or attempt.size - len(attempt.stopped_ranks) < self.slots.min_workers:
            return False
        until = time.monotonic() + SIGNAL_GRACE_S  # the signal may have come to everybody, and to us last
        while not self.job.stop.requested and time.monotonic() < until:
            time.sleep(TICK_S / 4)
        return not self.job.stop.requested

    def _prepare_slots(self, attempt: Attempt, slots: list[Slot], verdict: outcome.Verdict) -> None:
        """Has the slots up for the next attempt; on a new private cluster where the old one is gone."""
        private = self.job.private
        if private is None or not private.lost():
            try:
                self._refill_slots(attempt, slots, verdict)
            except ray.exceptions.RayError:
                if private is None or not private.lost():
                    raise
        while private is not None and private.lost():
            with contextlib.suppress(ray.exceptions.RayError):
                self._rebuild_cluster(slots)

    def _refill_slots(self, attempt: Attempt, slots: list[Slot], verdict: outcome.Verdict) -> None:
        """Vacates the slots of lost and preempted workers, and waits for as many workers as there can be now."""
        preempted = verdict.fault == "preempted"
        lost = attempt.lost_ranks
        for rank, slot in enumerate(slots):
            if preempted and rank in attempt.stopped_ranks:
                slot.vacate(self.job.config.cluster.stay_away)
            elif rank in lost:
                slot.vacate()
        self.slots.update_slots()
        nodes = {attempt.ranks[rank].info.node for rank in lost}
        alive = {node for node in nodes if self.slots.node_lives(node)}
        back = sum(attempt.ranks[rank].info.node in alive for rank in lost if not preempted)
        wished = len(self.slots.up_slots()) + back
        if verdict.device_fault is not None:
            wished = min(attempt.size, self.slots.room())
        self.slots.wait_for_slots(self.slots.min_workers, wished, self.job.config.cluster.start_timeout)
        workers = self.job.config.cluster.worker_count
        if len(self.slots.up_slots()) != attempt.size:
            text = f"going on with {len(self.slots.up_slots())} of {workers} workers"
            text += "" if len(self.slots.up_slots()) >= workers else "; more will join when there is room"
            self.job.show(NoteEvent(text).to_json())

    def _rebuild_cluster(self, slots: list[Slot]) -> None:
        """Starts a new private cluster, and reserves all slots anew on it."""
        assert self.job.private is not None
        for slot in slots:  # Ray can no longer be asked to end their agents
            if slot.info is not None and slot.info.ip == self.job.private.spec.ip:
                with contextlib.suppress(OSError):
                    os.kill(slot.info.pid, signal.SIGKILL)
        self.job.private.restart()
        if self.job.signals is not None:
            self.job.signals.install()
        left, self.slots = self.slots.left, self.slots_class(self.job, self.device)
        self.slots.left = [place.by_host_name() for place in left]
        self.slots.reserve_slots(self.size)

    def _can_grow_from(self, size: int) -> Callable[[], bool]:
        """A check for whether more than ``size`` workers have been up for long enough to be worth a restart."""

        def can_grow() -> bool:
            if size >= self.job.config.cluster.worker_count:
                return False
            self.slots.update_slots()
            return self.slots.count_settled(self.job.config.cluster.grow_after) > size

        return can_grow

    def _show(self, event: dict[str, Any]) -> None:
        """Passes an event on; once an attempt trains after an interruption, adds a line to ``restarts.jsonl``."""
        if event["event"] == "world" and self.interruption:
            marks = {**event["marks"], **self.interruption}
            event = RecoveredEvent(self.attempts, event["size"], marks).to_json()
            record = {key: value for key, value in event.items() if key != "event"}
            with RunDir(self.job.run_dir).restarts.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.interruption = {}
        self.console(event)

    def release_slots(self) -> None:
        """Ends the agents and gives their slots back to Ray."""
        self.slots.release_slots()

    # ----------------------------------------------------------------------------------------------------------- orders

    def make_orders(
        self, slots: list[Slot], rendezvous: RendezvousAddress, resources: dict[str, dict[str, float]]
    ) -> list[StartOrder]:
        """The order that starts the worker of each slot, by rank. ``resources``: all that each node has, by its id."""
        config = self.job.config
        config_json = config.model_dump_json(by_alias=True)
        infos = [slot.info for slot in slots if slot.info is not None]
        nodes = [info.node for info in infos]
        local_sizes, started = Counter(nodes), Counter[str]()
        forwarded = worker_env.forwarded_variables(os.environ)
        orders = []
        for rank, node in enumerate(nodes):
            cores, gpus = resources[node].get("CPU", 0.0), resources[node].get("GPU", 0.0)
            order = StartOrder(
                job=self.job.folder,
                rank=rank,
                size=len(slots),
                local_rank=started[node],
                rendezvous=rendezvous,
                target=self.job.target,
                device=self.device,
                config=config_json,
                corpus=self.job.corpus,
                cwd=str(Path.cwd()),
                log=str(RunDir(self.job.run_dir).log(rank)),
                threads=placement.threads_per_worker(self.device, config.cluster.cpus_per_worker, cores, gpus),
                forwarded=forwarded,
                gpus=infos[rank].gpus,
                stop_grace=config.cluster.stop_grace,
            )
            started[node] += 1
            env = {**self._environment(order, local_sizes[node]), **config.cluster.env}
            orders.append(replace(order, env=env))
        return orders

    def _environment(self, order: StartOrder, local_size: int) -> dict[str, str]:
        """Variables that torch, DeepSpeed, gloo and NCCL read. A GPU rank sees one device, so its LOCAL_RANK is 0."""
        return {
            "RANK": str(order.rank),
            "WORLD_SIZE": str(order.size),
            "LOCAL_RANK": "0" if self.device == "gpu" else str(order.local_rank),
            "LOCAL_WORLD_SIZE": str(local_size),
            "LOCAL_SIZE": str(local_size),
            "OMP_NUM_THREADS": str(order.threads),
            "TRIREME_T0": str(self.job.clock.start),
            **determinism.environment(self.job.config.cluster.deterministic),
        }
