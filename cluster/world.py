"""One start of all ranks, from the forks to the last end."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

import ray

from cluster import watch, word
from cluster.job import Job
from train.errors import UserError

POLL_S = 20.0
"""How long a steward holds a question for news open."""
HEAR_S = 0.2
"""How long a signal to the driver may wait to be seen."""
SETTLE_S = 1.0
"""After the first bad end, how long the others may take to end by themselves and say why."""
NOTICE_S = 1.5
"""How long a lost steward is taken for one that a signal to everybody has ended, and the signal to us is waited for."""
WORD_S = 65.0
"""After such a signal, how long a trainer may take to save and leave its last word."""


def ask(questions: Sequence[Any], timeout: float) -> list[Any]:
    """The stewards' answers, with an ear for signals in between."""
    deadline = time.monotonic() + timeout
    waiting = list(questions)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=HEAR_S)
        if waiting and time.monotonic() > deadline:
            raise UserError(f"{len(waiting)} of {len(questions)} workers did not answer within {timeout:.0f} s")
    return ray.get(list(questions))


def _answered(polls: dict[Any, int]) -> list[Any]:
    """The polls that were answered by now, after a moment's wait."""
    if not polls:
        time.sleep(HEAR_S)
        return []
    return ray.wait(list(polls), num_returns=1, timeout=HEAR_S, fetch_local=True)[0]


class World:
    """One start of all ranks."""

    def __init__(self, job: Job, stewards: Sequence[Any], places: Sequence[dict[str, Any]], generation: int) -> None:
        self.job = job
        self.stewards = stewards
        self.places = places
        self.generation = generation
        self.size = len(stewards)
        self.ends: dict[int, watch.End] = {}
        self.errors: dict[int, str] = {}
        self.orders: list[dict[str, Any]] = []
        self.orphans: dict[int, tuple[float, Exception]] = {}
        self.killed = False
        self.stop_sent = False

    def start(self, orders: Sequence[dict[str, Any]]) -> None:
        """Has every steward fork its trainer. UserError when the port is taken or the imports fail."""
        cluster = self.job.config.cluster
        place = self.places[0]
        [met] = ask([self.stewards[0].listen.remote(place["ip"], cluster.port)], cluster.start_timeout)
        if "error" in met:
            raise UserError(
                f"cluster.port={cluster.port} on {place['host']} ({place['ip']}): {met['error']}. "
                "Choose another, or cluster.port=0 for any free one"
            )
        meeting = {**met, "generation": self.generation}
        self.orders = [{**order, "meeting": meeting} for order in orders]
        starts = [s.start.remote(order) for s, order in zip(self.stewards, self.orders, strict=True)]
        answers = ask(starts, cluster.start_timeout)
        for rank, answer in enumerate(answers):
            if "failed" in answer:
                raise RuntimeError(f"rank {rank} could not be started on {self.places[rank]['host']}:\n{answer['failed']}")
        self.job.clock.mark("imports", answers[0]["ready"])
        self.job.show({"event": "started", "pids": [a["pid"] for a in answers], "generation": self.generation})

    def follow(self) -> watch.Verdict:
        """Shows what the ranks say until all have ended. After the first bad end the rest get a moment, then are
        killed.
        """
        polls = {s.poll.remote(POLL_S): rank for rank, s in enumerate(self.stewards)}
        bad_since: float | None = None
        while len(self.ends) < self.size:
            self._pass_on_stop()
            self._hear_orphans()
            for poll in _answered(polls):
                rank = polls.pop(poll)
                try:
                    news = ray.get(poll)
                except ray.exceptions.RayError as error:
                    self.orphans[rank] = time.monotonic(), error
                    continue
                for record in news:
                    self._take(rank, record)
                if rank not in self.ends:
                    polls[self.stewards[rank].poll.remote(POLL_S)] = rank
            if bad_since is None and watch.judge(list(self.ends.values()), self.size).cause:
                bad_since = time.monotonic()
            if bad_since is not None and not self.killed and time.monotonic() > bad_since + SETTLE_S:
                self._kill_rest()
        return watch.judge(list(self.ends.values()), self.size)

    def _pass_on_stop(self) -> None:
        if self.job.signals.heard is not None and not self.stop_sent:
            self.stop_sent = True
            self.job.show({"event": "stopping", "signal": self.job.signals.heard})
            self._to_all(signal.SIGTERM)

    def _hear_orphans(self) -> None:
        """Takes the last words of trainers whose stewards were lost to a signal to everybody; gives up the others."""
        for rank, (since, error) in list(self.orphans.items()):
            found = word.read(self.orders[rank])
            if found is not None:
                self.errors.setdefault(rank, found["error"] or "")
                self._ended(rank, {"code": found["code"], "pid": self.places[rank]["pid"]})
            elif time.monotonic() > since + (NOTICE_S if self.job.signals.heard is None else WORD_S):
                self._lost(rank, error)
            else:
                continue
            del self.orphans[rank]

    def _to_all(self, number: int) -> None:
        for rank, steward in enumerate(self.stewards):
            if rank not in self.ends and rank not in self.orphans:
                steward.signal.remote(number)

    def _kill_rest(self) -> None:
        self.killed = True
        self._to_all(signal.SIGKILL)

    def _take(self, rank: int, record: dict[str, Any]) -> None:
        if record.get("generation") != self.generation:
            return
        event = record["event"]
        if event == "exit":
            self._ended(rank, record)
        elif event == "error":
            self.errors.setdefault(rank, record["text"])
        elif event == "stop_asked":
            if self.job.signals.heard is None:
                self.job.signals.heard = record["signal"]
            self._pass_on_stop()
        elif event == "phase":
            if rank == 0:
                self.job.clock.mark(record["name"], record["t"])
                self.job.show(record)
        else:
            self.job.show(record)

    def _ended(self, rank: int, record: dict[str, Any]) -> None:
        self.ends[rank] = watch.End(
            rank=rank,
            order=len(self.ends),
            code=record["code"],
            host=record.get("host", ""),
            pid=record["pid"],
            error=self.errors.get(rank) or None,
            tail=tuple(record.get("tail", ())),
            peak_mib=record.get("peak_mib"),
            memory_mib=record.get("memory_mib"),
            oom=record.get("oom", 0),
            ours=self.killed,
            lost="was lost: the warm process that it was forked from ended" if record.get("orphaned") else None,
        )

    def _lost(self, rank: int, error: Exception) -> None:
        """A steward that does not answer took its trainer with it."""
        place = self.places[rank]
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self.ends[rank] = watch.End(
            rank=rank,
            order=len(self.ends),
            code=-signal.SIGKILL,
            host=place["host"],
            pid=place["pid"],
            ours=self.killed,
            lost=f"was lost with its steward, or their host went away: {first.strip()}",
        )
