"""The life of a job: workers are placed, a world is started and followed to its end; then, if there is more to do, another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from cluster.supervision import failure_report, outcome, restart_policy
from cluster.supervision.attempt import HEAR_S, NOTICE_S, Attempt
from cluster.supervision.job import Job
from cluster.supervision.slots import JobSlots, Slot, lives


class Supervisor:
    """Runs a job on the joined Ray cluster, beginning with ``size`` workers (default: all it asks for); in the places of ``gang``,
    where they were taken already, by the stewards that are in them.
    """

    def __init__(self, job: Job, device: str, size: int | None = None, gang: Sequence[Slot] = ()) -> None:
        self.job = replace(job, show=self._show)
        self.console = job.show
        self.device = device
        self.size, self.gang = size or job.config.cluster.workers, gang
        self.attempts = 0
        self.slots = JobSlots(self.job, device)
        self.row: list[restart_policy.Failure] = []
        """The failures since there was progress."""
        self.down: dict[str, Any] = {}
        """When and of what the last world failed, until the next one trains."""

    def run(self) -> outcome.Verdict:
        """Starts worlds until one is done, is stopped on request, or has failed so that another would not help."""
        self.slots.take(self.size, self.gang)
        while True:
            if self.job.signals.heard is not None:
                return outcome.Verdict("stopped")
            slots = self.slots.up()[: self.job.config.cluster.workers]
            world = Attempt(self.job, slots, self.attempts)
            verdict = self._live(world, slots)
            again = (
                self._after_failure(world, verdict) if verdict.kind == "failed" else self._after_stop(world, verdict)
            )
            if not again:
                return verdict
            failed = world.marks.get("failed", world.marks.get("ended"))
            self.down = {"fault": verdict.fault or "more workers", "failed": failed, "ended": time.time(), **self.down}
            self.attempts += 1
            self._prepare(world, slots, verdict)

    def _live(self, world: Attempt, slots: list[Slot]) -> outcome.Verdict:
        """Starts a world and follows it to its end."""
        try:
            self._note_places(world, world.start(self.orders(slots)))
        except (RuntimeError, ray.exceptions.RayError) as error:
            if self.job.private is None or not self.job.private.lost():
                world.lost |= self.slots.silent(slots)
            fault: outcome.Fault = "worker lost" if isinstance(error, ray.exceptions.RayError) else "raised"
            first, *rest = str(error).strip().splitlines()
            words = f"the workers could not be started: {first}"
            return outcome.Verdict(
                "failed",
                fault,
                finding=outcome.Diagnosis(fault, None, words, tuple(rest[-failure_report.MOST_LINES :])),
            )
        self.job.signals.running()
        return world.follow(self._more_than(len(slots)))

    def _note_places(self, world: Attempt, pids: list[int]) -> None:
        """Writes ``world.json``: where each rank runs, for people and tools."""
        ranks = [
            {
                "rank": rank,
                "pid": pid,
                "steward": place["pid"],
                "host": place["host"],
                "ip": place["ip"],
                "node": place["node"],
            }
            for rank, (pid, place) in enumerate(zip(pids, world.places, strict=True))
        ]
        aside = self.job.run_dir / ".world.json"
        aside.write_text(json.dumps({"generation": self.attempts, "ranks": ranks}) + "\n")
        aside.replace(self.job.run_dir / "world.json")

    # ------------------------------------------------------------------------------------------------------ what follows

    def _after_failure(self, world: Attempt, verdict: outcome.Verdict) -> bool:
        """Says what failed and what follows; whether to start again, after the wait that this may take."""
        last = [*world.lookout.beats.values(), *(end.at for end in world.ends.values() if end.at)]
        step = max((beat.step for beat in last), default=0)
        failure = restart_policy.Failure(verdict.fault or "", failure_report.signature(verdict), step, self._newest())
        self.row = restart_policy.in_a_row(self.row, failure)
        decision = restart_policy.decide(self.row, self.job.config.cluster.max_failures)
        again = decision.again and self.job.signals.heard is None
        self.job.show(
            {"event": "failure", "lines": failure_report.explain(verdict), "next": decision.words, "again": again}
        )
        until = time.monotonic() + decision.wait_s
        while again and time.monotonic() < until:
            time.sleep(HEAR_S)
            again = self.job.signals.heard is None
        return again

    def _newest(self) -> int:
        """The step of the newest checkpoint; a folder of that name is complete."""
        found = self.job.run_dir.glob("checkpoints/step_*")
        return max((int(path.name[5:]) for path in found if path.name[5:].isdecimal()), default=0)

    def _after_stop(self, world: Attempt, verdict: outcome.Verdict) -> bool:
        """Whether a world that was stopped and saved is followed by another: a smaller one, without the workers that were told to
        end while the job was not, or a larger one, that it was stopped for.
        """
        if verdict.kind != "stopped" or self.job.signals.heard is not None:
            return False
        if world.leaving:
            return True
        if verdict.fault != "preempted" or world.size - len(world.asked) < self.slots.least:
            return False
        until = time.monotonic() + NOTICE_S  # the signal may have come to everybody, and to us last
        while self.job.signals.heard is None and time.monotonic() < until:
            time.sleep(HEAR_S / 4)
        return self.job.signals.heard is None

    def _prepare(self, world: Attempt, slots: list[Slot], verdict: outcome.Verdict) -> None:
        """Has the workers up for the next world; on a new private cluster where the old one is gone."""
        private = self.job.private
        if private is None or not private.lost():
            try:
                self._fill(world, slots, verdict)
            except ray.exceptions.RayError:
                if private is None or not private.lost():
                    raise
        while private is not None and private.lost():
            with contextlib.suppress(ray.exceptions.RayError):
                self._rebuild(slots)

    def _fill(self, world: Attempt, slots: list[Slot], verdict: outcome.Verdict) -> None:
        """Empties the places that were lost or are to be left, and waits for as many workers as there can be now."""
        preempted = verdict.fault == "preempted"
        for rank, slot in enumerate(slots):
            if preempted and rank in world.asked:
                slot.empty(self.job.config.cluster.stay_away)
            elif rank in world.lost:
                slot.empty()
        self.slots.look()
        alive = {node for node in {world.places[rank]["node"] for rank in world.lost} if lives(node)}
        back = sum(world.places[rank]["node"] in alive for rank in world.lost if not preempted)
        self.slots.wait(self.slots.least, len(self.slots.up()) + back, self.job.config.cluster.start_timeout)
        workers = self.job.config.cluster.workers
        if len(self.slots.up()) != world.size:
            text = f"going on with {len(self.slots.up())} of {workers} workers"
            text += "" if len(self.slots.up()) >= workers else "; more will join when there is room"
            self.job.show({"event": "note", "text": text})

    def _rebuild(self, slots: list[Slot]) -> None:
        """A new private cluster, and all places taken anew on it."""
        assert self.job.private is not None
        for slot in slots:  # Ray can no longer be asked to end them
            if slot.info is not None and slot.info["ip"] == self.job.private.spec.ip:
                with contextlib.suppress(OSError):
                    os.kill(slot.info["pid"], signal.SIGKILL)
        self.job.private.restart()
        self.job.signals.listen()
        self.slots = JobSlots(self.job, self.device)
        self.slots.take(self.size)

    def _more_than(self, size: int) -> Any:
        """Asks whether more than ``size`` workers have been up for long enough to be worth a restart."""

        def more() -> bool:
            if size >= self.job.config.cluster.workers:
                return False
            self.slots.look()
            return self.slots.settled(self.job.config.cluster.grow_after) > size

        return more

    def _show(self, event: dict[str, Any]) -> None:
        """Passes an event on; that a world trains is also noted in ``restarts.jsonl`` where another had failed before it."""
        if event["event"] == "world" and self.down:
            record = {"generation": self.attempts, "workers": event["size"], **event["marks"], **self.down}
            with (self.job.run_dir / "restarts.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.down = {}
            event = {"event": "recovered", **record}
        self.console(event)

    def release(self) -> None:
        """Ends the stewards and gives their places back."""
        self.slots.release()

    # ------------------------------------------------------------------------------------------------------------ orders

    def orders(self, slots: list[Slot]) -> list[dict[str, Any]]:
        """What each rank's steward needs to start its trainer, but where they meet."""
        config = self.job.config
        text = config.model_dump_json(by_alias=True)
        seen: dict[str, int] = {}
        orders = []
        for rank, slot in enumerate(slots):
            assert slot.info is not None
            node = slot.info["node"]
            local = seen.setdefault(node, 0)
            seen[node] += 1
            orders.append(
                {
                    "job": self.job.folder,
                    "rank": rank,
                    "size": len(slots),
                    "local_rank": local,
                    "node": node,
                    "config": text,
                    "corpus": self.job.corpus,
                    "cwd": str(Path.cwd()),
                    "log": str(self.job.run_dir / "logs" / f"rank_{rank}.log"),
                    "threads": config.cluster.cpus_per_worker,
                    "env": {},
                }
            )
        for order in orders:
            order["env"] = self._environment(order, seen[order["node"]])
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
            "TRIREME_T0": str(self.job.clock.start),
        }
