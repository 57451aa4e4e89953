"""One start of all ranks of a job, from the forks of the workers to the exit of the last."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cluster.device_health.evidence import DeviceEvidence
from cluster.supervision import outcome
from cluster.supervision.attempt_state import (
    Action,
    AttemptFacts,
    AttemptState,
    Ending,
    Phase,
    judge_ending,
    next_state,
)
from cluster.supervision.health_monitor import HealthMonitor, HostStatus, RankStatus, group_by_host, heartbeat_of
from cluster.supervision.job import Job
from cluster.supervision.slots import Slot, take_ready
from cluster.supervision.timeouts import (
    EXIT_RECORD_S,
    GROW_CHECK_S,
    KILL_REPORT_S,
    MUTE_S,
    POLL_S,
    SIGNAL_GRACE_S,
    TEARDOWN_S,
    TICK_S,
)
from cluster.worker import exit_record
from cluster.worker.messages import RendezvousAddress, SlotInfo, StartOrder
from train.errors import ExitCode, UserError
from train.events import NoteEvent, StartedEvent, StoppingEvent, WorldEvent


class Attempt:
    """One start of all ranks of a job: ``start`` forks their workers, ``follow`` waits for the verdict."""

    def __init__(self, job: Job, slots: Sequence[Slot], number: int, node_lives: Callable[[str], bool]) -> None:
        """``number`` counts the attempts of the job from 0; ``node_lives`` says whether the node of an id lives."""
        self.job = job
        self.node_lives = node_lives
        self.number = number
        infos = [slot.info for slot in slots if slot.info is not None]
        self.hosts = group_by_host([slot.agent for slot in slots], infos)
        self.size = len(infos)
        self.state = AttemptState()
        self.monitor = HealthMonitor(job, self.hosts)
        self.ranks = self.monitor.ranks
        self.exits: list[outcome.WorkerExit] = []
        """The exits so far, in the order in which the driver learned of them."""
        self.failed = False
        """A rank has ended badly."""
        self.untrained = self.size
        """Ranks that have not made a step yet."""
        self.diagnosis: outcome.Diagnosis | None = None
        """Why the living ranks could not go on, where they were killed for that."""
        self.stop_agreed = False
        """All ranks have seen a stop signal and are saving."""
        self.at_boundary = job.config.save_every == 0
        """A checkpoint was just written; or none will be before the end."""
        self.marks: dict[str, float] = {}
        """When the attempt came to each of its phases, seconds since 1970; "train": when all ranks had made a step."""
        self._ray_lost: float | None = None
        """Since when Ray's own processes on the driver's host have been gone (monotonic)."""
        self._grow_checked = 0.0

    @property
    def stopped_ranks(self) -> set[int]:
        """Ranks whose workers were told to end by a signal of their own."""
        return {status.rank for status in self.ranks if status.stop_signal is not None}

    @property
    def lost_ranks(self) -> set[int]:
        """Ranks whose slots have lost their agents."""
        return {status.rank for status in self.ranks if status.agent_lost}

    @property
    def furthest_step(self) -> int:
        """The furthest step that any rank is known to have been at."""
        heartbeats = [status.heartbeat for status in self.ranks]
        heartbeats += [exited.at for exited in self.exits]
        return max((heartbeat.step for heartbeat in heartbeats if heartbeat is not None), default=0)

    # -------------------------------------------------------------------------------------------------------- starting

    def start(self, make_orders: Callable[[RendezvousAddress], Sequence[StartOrder]]) -> list[int]:
        """Has every agent fork its worker by its order: their pids, by rank.

        UserError when the port is taken, RuntimeError when the imports fail, RayError when an agent is gone.
        """
        orders = make_orders(self._bind_rendezvous())
        questions = []
        for host in self.hosts:
            questions.append(host.agent.start_workers.remote([orders[status.rank] for status in host.ranks]))
        answers = self._ask_agents(questions)
        for host, results in zip(self.hosts, answers, strict=True):
            for status, result in zip(host.ranks, results, strict=True):
                where = status.info.host
                if result.refused is not None:
                    raise UserError(f"{where}: {result.refused}")
                if result.failed is not None:
                    raise RuntimeError(f"rank {status.rank} could not be started on {where}:\n{result.failed}")
                status.order, status.pid = orders[status.rank], result.pid
        self.job.clock.mark("imports", answers[0][0].ready)
        pids = [status.pid for status in self.ranks]
        self.job.show(StartedEvent(pids, self.number).to_json())
        return pids

    def _bind_rendezvous(self) -> RendezvousAddress:
        cluster, host = self.job.config.cluster, self.ranks[0].host
        info = host.info
        [bound] = self._ask_agents([host.agent.bind_rendezvous.remote(info.ip, cluster.port)])
        if bound.error is not None:
            raise UserError(
                f"cluster.port={cluster.port} on {info.host} ({info.ip}): {bound.error}. "
                "Choose another, or cluster.port=0 for any free one"
            )
        return RendezvousAddress(info.ip, bound.port, self.number)

    def _ask_agents(self, questions: Sequence[Any]) -> list[Any]:
        """The agents' answers, waited for in ticks so that signals and the loss of Ray are seen in between."""
        timeout, waiting = self.job.config.cluster.start_timeout, list(questions)
        deadline = time.monotonic() + timeout
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=TICK_S)
            if waiting and self.job.private is not None:
                self.job.private.check()
            if waiting and time.monotonic() > deadline:
                raise UserError(
                    f"{len(waiting)} of {len(questions)} hosts did not answer within "
                    f"cluster.start_timeout={timeout} s: is one overloaded, or cut off? Give the same command again, "
                    "or a longer time"
                )
        return ray.get(list(questions))

    # ------------------------------------------------------------------------------------------------------- following

    def follow(self, can_grow: Callable[[], bool] = lambda: False) -> outcome.Verdict:
        """Shows the ranks' events until all have ended. When one has failed or all hang, the others are killed.

        Where ``can_grow()`` says that a larger attempt is possible, the ranks are told to save and end after their next
        checkpoint.
        """
        self._grow_checked = time.monotonic()
        polls = {host.agent.poll_events.remote(POLL_S): host for host in self.hosts}
        while len(self.exits) < self.size:
            self.state, actions = next_state(self.state, self._observe(can_grow))
            for action in actions:
                self._act(action)
            self._check_unreachable()
            self._receive_events(polls)
        return self._verdict()

    def _observe(self, can_grow: Callable[[], bool]) -> AttemptFacts:
        """The facts that decide on the next state; what costs time is asked only while every rank is well."""
        stop_requested = self.job.stop.requested
        if self.state.phase is Phase.KILLED:
            return AttemptFacts(time.monotonic(), stop_requested)
        if self.failed:
            known = outcome.first_cause_known(self.exits)
            return AttemptFacts(time.monotonic(), stop_requested, failed=True, cause_known=known)
        self.diagnosis = self._diagnose()
        if self.diagnosis is not None:
            return AttemptFacts(time.monotonic(), stop_requested, stuck=True)
        grow = False
        if time.monotonic() > self._grow_checked + GROW_CHECK_S:
            self._grow_checked = time.monotonic()
            grow = can_grow() and self.at_boundary and not self.stopped_ranks
        return AttemptFacts(time.monotonic(), stop_requested, should_grow=grow)

    def _act(self, action: Action) -> None:
        if action is Action.STOP_RANKS:
            if self.job.stop.signal is not None:
                self.job.show(StoppingEvent(self.job.stop.signal).to_json())
            self._signal_living(signal.SIGTERM)
        elif action is Action.KILL_RANKS:
            self._signal_living(signal.SIGKILL)
        elif action is Action.GIVE_UP_LATE:
            self._give_up_late()

    def _verdict(self) -> outcome.Verdict:
        preempted = self.stopped_ranks if not self.state.stopping else ()
        return outcome.decide_outcome(self.exits, self.size, self.diagnosis, preempted)

    @property
    def _stop_signalled(self) -> bool:
        """Whether a stop signal was seen anywhere. It may have been sent to everybody, Ray and agents included."""
        return self.job.stop.requested or bool(self.stopped_ranks) or self.stop_agreed

    def _diagnose(self) -> outcome.Diagnosis | None:
        """Why the living ranks cannot go on, if they cannot: in ways that they cannot tell themselves."""
        # A signal to everybody ends Ray's processes too, while the workers save.
        saving = self.state.stopping or self._stop_signalled
        if self.job.private is None or saving or not self.job.private.lost():
            self._ray_lost = None
            return self.monitor.diagnose()
        self._ray_lost = self._ray_lost or time.monotonic()
        if time.monotonic() <= self._ray_lost + SIGNAL_GRACE_S:
            return None
        return outcome.Diagnosis("worker lost", None, "processes of Ray's own have ended on the driver's host")

    def _check_unreachable(self) -> None:
        """Reads the exit records of workers whose agents do not answer; in time counts those without one as lost."""
        signalled, now = self._stop_signalled, time.monotonic()
        for host in self.hosts if signalled else ():
            mute = host.answered is not None and now > host.answered + MUTE_S
            if mute and host.living:
                host.unreachable = now, ray.exceptions.RayError("its steward does not answer")
        unreachable = [(*host.unreachable, host) for host in self.hosts if host.unreachable is not None]
        for since, error, host in sorted(unreachable, key=lambda row: row[0]):
            for status in host.ranks:
                if status.exit is not None:
                    continue
                assert status.order is not None
                record = exit_record.read(status.order)
                if record is not None:
                    status.agent_lost = True
                    status.stop_signal = status.stop_signal or signal.SIGTERM
                    status.error = status.error or {"text": record["error"] or ""}
                    self._add_exit(status, {"code": record["code"], "pid": host.info.pid})
                    continue
                patience = status.order.stop_grace + EXIT_RECORD_S if signalled else SIGNAL_GRACE_S
                if self.state.phase is Phase.KILLED or now > since + patience:
                    self._add_lost_agent(status, error)
            if all(status.exit is not None for status in host.ranks):
                host.unreachable = None

    def _signal_living(self, number: int) -> None:
        for host in self.hosts:
            if host.living:
                host.agent.signal_workers.remote(number, [status.pid for status in host.living])

    def _give_up_late(self) -> None:
        """Counts killed ranks as lost whose exits have not been reported in time."""
        now, ray_lost = time.monotonic(), self.job.private is not None and self.job.private.lost()
        for host in self.hosts if now > self.state.since else ():
            ending = judge_ending(now, self.state.since, host.answered)
            if ending is Ending.UNDER_WAY and not ray_lost:
                continue
            for status in host.living:
                if ray_lost or ending is Ending.SILENT:
                    self._add_lost_agent(status, None)
                else:
                    self._add_stuck_worker(status)

    # --------------------------------------------------------------------------------------------------------- events

    def _receive_events(self, polls: dict[Any, HostStatus]) -> None:
        """Handles all answers to ``polls`` that are there within a tick, and polls those agents again."""
        if not polls:
            time.sleep(TICK_S)
            return
        for poll in take_ready(list(polls), TICK_S):
            host = polls.pop(poll)
            try:
                events = ray.get(poll)
            except ray.exceptions.RayError as error:
                if any(status.exit is None for status in host.ranks):
                    host.unreachable = time.monotonic(), error
                continue
            host.answered = time.monotonic()
            host.unreachable = None
            for record in events:
                self._handle_event(record)
            if any(status.exit is None for status in host.ranks):
                polls[host.agent.poll_events.remote(POLL_S)] = host

    def _handle_event(self, record: dict[str, Any]) -> None:
        if record.get("generation") != self.number:
            return
        status, event = self.ranks[record["rank"]], record["event"]
        if status.exit is not None:
            return
        if event == "beat":
            status.heartbeat = heartbeat_of(record)
        elif event == "exit":
            self._add_exit(status, record)
        elif event == "error":
            status.error = status.error or record
        elif event == "stop_asked":
            status.stop_signal = record["signal"]
            if not self.state.stopping:
                where = status.info.host
                self.job.show(NoteEvent(f"rank {status.rank} on {where} was told to end: saving").to_json())
        elif event == "stop_agreed":
            self.stop_agreed = True
        elif event == "phase":
            self._handle_phase(status, record)
        else:
            if self.job.config.save_every:
                self.at_boundary = event == "save" or (self.at_boundary and event != "step")
            self.job.show(record)

    def _handle_phase(self, status: RankStatus, record: dict[str, Any]) -> None:
        if status.rank == 0:
            self.job.clock.mark(record["name"], record["t"])
            if record["name"] != "train":
                self.marks.setdefault(record["name"], record["t"])
            self.job.show(record)
        if record["name"] == "train" and not status.trains:
            status.trains = True
            self.untrained -= 1
            if self.untrained == 0:
                self.marks["train"] = max(record["t"], self.marks.get("train", 0.0))
                self.job.show(WorldEvent(self.number, self.size, self.marks).to_json())

    def _add_exit(self, status: RankStatus, record: dict[str, Any]) -> None:
        orphaned = record.get("orphaned")
        error = status.error or {}
        self.marks.setdefault(
            "failed" if record["code"] not in (ExitCode.OK, ExitCode.STOPPED) else "ended", record.get("t", time.time())
        )
        self._note_exit(
            status,
            code=record["code"],
            host=status.info.host,
            pid=record["pid"],
            error=error.get("text") or None,
            kind=error.get("kind", "exception"),
            tail=tuple(record.get("tail", ())),
            peak_mib=record.get("peak_mib"),
            memory_mib=record.get("memory_mib"),
            oom=record.get("oom", 0),
            killed_by_driver=self.state.phase is Phase.KILLED,
            fault="worker lost" if orphaned else None,
            description="was lost: the warm process that it was forked from ended" if orphaned else "",
            at=heartbeat_of(record["at"]) if "at" in record else status.heartbeat,
            gpu=",".join(status.info.gpus),
            evidence=DeviceEvidence.from_json(record["evidence"]) if "evidence" in record else None,
        )

    def _note_exit(self, status: RankStatus, **fields: Any) -> None:
        """Counts a rank as ended, in the way that the ``fields`` of a ``WorkerExit`` say."""
        status.exit = outcome.WorkerExit(rank=status.rank, order=len(self.exits), **fields)
        self.exits.append(status.exit)
        self.failed = self.failed or status.exit.code not in (ExitCode.OK, ExitCode.STOPPED)

    def _add_lost_agent(self, status: RankStatus, error: Exception | None) -> None:
        """Counts a rank as ended whose agent does not answer: the fork server kills a worker without its agent."""
        host = status.host
        host.loss = host.loss or self._explain_loss(host.info, error)
        fault, description = host.loss
        # Where the agent alone is lost, the other slots of its host have theirs.
        status.agent_lost = fault != "worker lost" or status is host.ranks[0]
        self.marks.setdefault("failed", time.time())
        self._note_exit(
            status,
            code=-signal.SIGKILL,
            host=status.info.host,
            pid=host.info.pid,
            fault=fault,
            description=description,
            at=status.heartbeat,
        )

    def _add_stuck_worker(self, status: RankStatus) -> None:
        """Counts a killed rank as ended whose process does not end; it was killed for another's sake and is no cause.

        Its agent is kept, and the fork server gives its GPU to nobody before the process is gone.
        """
        self._note_exit(
            status,
            code=-signal.SIGKILL,
            host=status.info.host,
            pid=status.pid,
            killed_by_driver=True,
            at=status.heartbeat,
        )
        where = f"rank {status.rank} on {status.info.host} (pid {status.pid})"
        text = f"{where} was killed and has not ended for {TEARDOWN_S:.0f} s: the next worker there waits for it"
        self.job.show(NoteEvent(text).to_json())

    def _explain_loss(self, info: SlotInfo, error: Exception | None) -> tuple[outcome.Fault, str]:
        if self.job.private is not None and self.job.private.lost():
            return "worker lost", "was lost: processes of Ray's own have ended"
        if error is None:
            return "network lost", f"was lost: its host has not answered for {KILL_REPORT_S:.0f} s"
        if not self.node_lives(info.node):
            return "host lost", "was lost with its host"
        return "worker lost", "was lost with its steward, the process that watched over it"
