"""One start of all ranks, from the forks to the last end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cluster.supervision import outcome
from cluster.supervision.health_monitor import HealthMonitor, beat_of
from cluster.supervision.job import Job
from cluster.supervision.slots import Slot, lives
from cluster.worker import exit_record
from train.errors import ExitCode, UserError

POLL_S = 1.0
"""How long a steward holds a question for news open; then it answers with its trainer's pulse alone."""
HEAR_S = 0.2
"""How long a signal to the driver may wait to be seen."""
SETTLE_S = 1.0
"""After a bad end that may be another's consequence, how long the others may take to end by themselves and say why."""
LOST_S = 5.0
"""How long a steward may take to say that the trainer it was told to kill has ended."""
NOTICE_S = 1.5
"""How long a lost steward is taken for one that a signal to everybody has ended, and the signal to us is waited for."""
MUTE_S = 3.0
"""After such a signal, how long a steward may not answer before its trainer's last word is looked for: Ray may end them slowly."""
WORD_S = 65.0
"""After such a signal, how long a trainer may take to save and leave its last word."""
LOOK_S = 0.5
"""Between questions whether there is room for more workers."""


class Attempt:
    """One start of all ranks."""

    def __init__(self, job: Job, slots: Sequence[Slot], generation: int) -> None:
        self.job = job
        self.stewards = [slot.agent for slot in slots]
        self.places: list[dict[str, Any]] = [slot.info or {} for slot in slots]
        self.number = generation
        self.size = len(slots)
        self.ends: dict[int, outcome.WorkerExit] = {}
        self.errors: dict[int, dict[str, Any]] = {}
        self.orders: list[dict[str, Any]] = []
        self.pids: list[int] = []  # of the trainers, by rank
        self.orphans: dict[int, tuple[float, Exception]] = {}
        self.lookout = HealthMonitor(job, self.stewards, self.places)
        self.lost: set[int] = set()
        """Ranks whose stewards are gone."""
        self.asked: dict[int, int] = {}
        """Ranks that were told to end by a signal of their own, and the signal."""
        self.agreed = False
        """The ranks are saving, to end."""
        self.marks: dict[str, float] = {}
        """When this start came to each of its phases, seconds since 1970; "train": when all ranks had made a step."""
        self.at_boundary = job.config.save_every == 0
        """A checkpoint was just written; or none will be before the end."""
        self.leaving = False
        """Told to save and end, by the driver, for any reason."""
        self.finding: outcome.Diagnosis | None = None
        self._killed: float | None = None
        self._ray_lost: float | None = None
        self._first_steps: set[int] = set()

    # -------------------------------------------------------------------------------------------------------- starting

    def start(self, orders: Sequence[dict[str, Any]]) -> list[int]:
        """Has every steward fork its trainer: their pids, by rank. UserError when the port is taken, RuntimeError when the imports
        fail, RayError when a steward is gone.
        """
        cluster = self.job.config.cluster
        place = self.places[0]
        [met] = self._ask([self.stewards[0].listen.remote(place["ip"], cluster.port)])
        if "error" in met:
            raise UserError(
                f"cluster.port={cluster.port} on {place['host']} ({place['ip']}): {met['error']}. "
                "Choose another, or cluster.port=0 for any free one"
            )
        meeting = {**met, "generation": self.number}
        self.orders = [{**order, "meeting": meeting} for order in orders]
        starts = [s.start.remote(order) for s, order in zip(self.stewards, self.orders, strict=True)]
        answers = self._ask(starts)
        for rank, answer in enumerate(answers):
            if "failed" in answer:
                raise RuntimeError(
                    f"rank {rank} could not be started on {self.places[rank]['host']}:\n{answer['failed']}"
                )
        self.job.clock.mark("imports", answers[0]["ready"])
        self.pids = [answer["pid"] for answer in answers]
        self.job.show({"event": "started", "pids": self.pids, "generation": self.number})
        return self.pids

    def _ask(self, questions: Sequence[Any]) -> list[Any]:
        """The stewards' answers, with an ear for signals in between."""
        timeout, waiting = self.job.config.cluster.start_timeout, list(questions)
        deadline = time.monotonic() + timeout
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=HEAR_S)
            if waiting and self.job.private is not None:
                self.job.private.check()
            if waiting and time.monotonic() > deadline:
                raise UserError(f"{len(waiting)} of {len(questions)} workers did not answer within {timeout} s")
        return ray.get(list(questions))

    # ------------------------------------------------------------------------------------------------------- following

    def follow(self, more: Callable[[], bool] = lambda: False) -> outcome.Verdict:
        """Shows what the ranks say until all have ended. When one has failed or all hang, the others are killed.

        Where ``more()`` says that a larger world is ready, the ranks are asked to save and end after their next checkpoint.
        """
        polls = {s.poll.remote(POLL_S): rank for rank, s in enumerate(self.stewards)}
        uncertain, looked = None, time.monotonic()
        while len(self.ends) < self.size:
            self._pass_on_stop()
            self._hear_orphans()
            self._hear(polls)
            if self._killed is not None:
                self._give_up_silent()
            elif self._verdict().cause is not None:
                uncertain = uncertain or time.monotonic()
                if outcome.first_cause_known(list(self.ends.values())) or time.monotonic() > uncertain + SETTLE_S:
                    self._kill_rest()
            else:
                self._look_after()
                if time.monotonic() > looked + LOOK_S:
                    looked = time.monotonic()
                    if more() and self.at_boundary and not (self.leaving or self.asked):
                        self._leave()
        return self._verdict()

    def _verdict(self) -> outcome.Verdict:
        return outcome.decide_outcome(
            list(self.ends.values()), self.size, self.finding, self.asked if not self.leaving else ()
        )

    def _hear(self, polls: dict[Any, int]) -> None:
        """Takes what the stewards have answered by now, after a moment's wait, and asks them again."""
        if not polls:
            time.sleep(HEAR_S)
            return
        for poll in ray.wait(list(polls), num_returns=1, timeout=HEAR_S, fetch_local=True)[0]:
            rank = polls.pop(poll)
            if rank in self.ends:
                continue
            try:
                news = ray.get(poll)
            except ray.exceptions.RayError as error:
                self.orphans[rank] = time.monotonic(), error
                continue
            self.lookout.heard[rank] = time.monotonic()
            self.orphans.pop(rank, None)
            for record in news:
                self._take(rank, record)
            if rank not in self.ends:
                polls[self.stewards[rank].poll.remote(POLL_S)] = rank

    def _pass_on_stop(self) -> None:
        if self.job.stop.requested and not self.leaving:
            self.job.show({"event": "stopping", "signal": self.job.stop.signal})
            self._leave()

    def _leave(self) -> None:
        """Has all ranks save and end."""
        self.leaving = True
        self._to_all(signal.SIGTERM)

    def _look_after(self) -> None:
        """Looks for what the living ranks cannot say themselves, and ends the world where it cannot go on."""
        living = [rank for rank in range(self.size) if rank not in self.ends and rank not in self.orphans]
        told = (
            self.leaving or self.asked or self.agreed
        )  # a signal to everybody ends Ray's processes too, and trainers save
        if self.job.private is None or told or not self.job.private.lost():
            self._ray_lost = None
            self.finding = self.lookout.find(living)
        else:
            self._ray_lost = self._ray_lost or time.monotonic()
            if time.monotonic() > self._ray_lost + NOTICE_S:
                self.finding = outcome.Diagnosis(
                    "worker lost", None, "processes of Ray's own have ended on the driver's host"
                )
        if self.finding is not None:
            self._kill_rest()

    def _hear_orphans(self) -> None:
        """Takes the last words of trainers whose stewards were lost to a signal to everybody; gives up the others."""
        told = self.job.stop.requested or self.asked or self.agreed
        now, mute = time.monotonic(), ray.exceptions.RayError("its steward does not answer")
        for rank in set(range(self.size)) - self.ends.keys() if told else ():
            if now > self.lookout.heard.get(rank, now) + MUTE_S:
                self.orphans.setdefault(rank, (now, mute))
        for rank, (since, error) in list(self.orphans.items()):
            found = exit_record.read(self.orders[rank])
            if found is not None:
                self.lost.add(rank)
                self.asked.setdefault(rank, signal.SIGTERM)
                self.errors.setdefault(rank, {"text": found["error"] or ""})
                self._ended(rank, {"code": found["code"], "pid": self.places[rank]["pid"]})
            elif self._killed is not None or time.monotonic() > since + (WORD_S if told else NOTICE_S):
                self._lost(rank, error)
            else:
                continue
            del self.orphans[rank]

    def _to_all(self, number: int) -> None:
        for rank, steward in enumerate(self.stewards):
            if rank not in self.ends and rank not in self.orphans:
                steward.signal.remote(number, self.pids[rank])

    def _kill_rest(self) -> None:
        self._killed = time.monotonic()
        self._to_all(signal.SIGKILL)

    def _give_up_silent(self) -> None:
        """After the kill, takes those for lost whose stewards do not say that they have ended."""
        assert self._killed is not None
        patience = 0.0 if self.job.private is not None and self.job.private.lost() else LOST_S
        for rank in range(self.size):
            if rank not in self.ends and rank not in self.orphans and time.monotonic() > self._killed + patience:
                self._lost(rank, None)

    # --------------------------------------------------------------------------------------------------------- hearing

    def _take(self, rank: int, record: dict[str, Any]) -> None:
        if record.get("generation") != self.number:
            return
        event = record["event"]
        if event == "beat":
            self.lookout.beats[rank] = beat_of(record)
        elif event == "exit":
            self._ended(rank, record)
        elif event == "error":
            self.errors.setdefault(rank, record)
        elif event == "stop_asked":
            self.asked[rank] = record["signal"]
            if not self.leaving:
                where = self.places[rank]["host"]
                self.job.show({"event": "note", "text": f"rank {rank} on {where} was told to end: saving"})
        elif event == "stop_agreed":
            self.agreed = True
        elif event == "phase":
            self._phase(rank, record)
        else:
            if self.job.config.save_every:
                self.at_boundary = event == "save" or (self.at_boundary and event != "step")
            self.job.show(record)

    def _phase(self, rank: int, record: dict[str, Any]) -> None:
        if rank == 0:
            self.job.clock.mark(record["name"], record["t"])
            if record["name"] != "train":
                self.marks.setdefault(record["name"], record["t"])
            self.job.show(record)
        if record["name"] == "train" and rank not in self._first_steps:
            self._first_steps.add(rank)
            if len(self._first_steps) == self.size:
                self.marks["train"] = max(record["t"], self.marks.get("train", 0.0))
                self.job.show({"event": "world", "generation": self.number, "size": self.size, "marks": self.marks})

    def _ended(self, rank: int, record: dict[str, Any]) -> None:
        orphaned = record.get("orphaned")
        error = self.errors.get(rank, {})
        self.marks.setdefault(
            "failed" if record["code"] not in (ExitCode.OK, ExitCode.STOPPED) else "ended", record.get("t", time.time())
        )
        self.ends[rank] = outcome.WorkerExit(
            rank=rank,
            order=len(self.ends),
            code=record["code"],
            host=record.get("host", self.places[rank]["host"]),
            pid=record["pid"],
            error=error.get("text") or None,
            kind=error.get("kind", "exception"),
            tail=tuple(record.get("tail", ())),
            peak_mib=record.get("peak_mib"),
            memory_mib=record.get("memory_mib"),
            oom=record.get("oom", 0),
            killed_by_driver=self._killed is not None,
            fault="worker lost" if orphaned else None,
            words="was lost: the warm process that it was forked from ended" if orphaned else "",
            at=beat_of(record["at"]) if "at" in record else self.lookout.beats.get(rank),
        )

    def _lost(self, rank: int, error: Exception | None) -> None:
        """A steward that does not answer took its trainer with it."""
        self.lost.add(rank)
        place = self.places[rank]
        if self.job.private is not None and self.job.private.lost():
            fault, words = "worker lost", "was lost: processes of Ray's own have ended"
        elif error is None:
            fault, words = "network lost", f"was lost: its host has not answered for {LOST_S:.0f} s"
        elif not lives(place["node"]):
            fault, words = "host lost", "was lost with its host"
        else:
            fault, words = "worker lost", "was lost with its steward, the process that watched over it"
        self.marks.setdefault("failed", time.time())
        self.ends[rank] = outcome.WorkerExit(
            rank=rank,
            order=len(self.ends),
            code=-signal.SIGKILL,
            host=place["host"],
            pid=place["pid"],
            fault=fault,  # type: ignore[arg-type]
            words=words,
            at=self.lookout.beats.get(rank),
        )
