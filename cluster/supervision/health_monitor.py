"""Watches the living ranks of an attempt: which are silent, hang or lag, with their stacks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from cluster.device_health.device_fault import classify
from cluster.device_health.evidence import DeviceEvidence, describe_evidence
from cluster.device_health.flight_record import GroupRecord, find_stuck
from cluster.device_health.gpu_state import GpuState, describe_speed
from cluster.device_health.slow_clocks import SlowClockDetector
from cluster.supervision import hang_detector, outcome
from cluster.supervision.job import Job
from cluster.supervision.timeouts import DEVICE_CHECK_S, DRIVER_PAUSE_S, INSPECT_S, TICK_S
from cluster.worker.messages import SlotInfo, StartOrder
from train.events import NoteEvent
from train.util.format import plural
from train.util.io import to_json
from train.util.run_layout import RunDir

STEPS_WRITTEN_S = 10.0
"""Between lines of ``ranks.jsonl``, at least."""
MOST_RANKS = 6
"""Ranks whose stacks are shown in short where none can be blamed."""


@dataclass
class HostStatus:
    """One host of an attempt, as far as the driver knows: it hears the host's agent, and by it all ranks there."""

    agent: Any
    """Handle of its Ray actor, which is that of the host's first slot."""
    info: SlotInfo
    """Where the agent is."""
    ranks: list[RankStatus] = field(default_factory=list)
    answered: float | None = None
    """When the agent last answered a poll (monotonic)."""
    unreachable: tuple[float, Exception] | None = None
    """Since when the agent has not answered (monotonic), and how Ray says so."""
    loss: tuple[outcome.Fault, str] | None = None
    """What has become of it and its ranks, where it is lost: found out once, for a host that is gone answers slowly."""

    @property
    def living(self) -> list[RankStatus]:
        """The ranks that live, as far as is known, where the agent answers."""
        return [] if self.unreachable is not None else [status for status in self.ranks if status.exit is None]


@dataclass
class RankStatus:
    """One rank of an attempt, as far as the driver knows."""

    rank: int
    host: HostStatus
    info: SlotInfo
    order: StartOrder | None = None
    """What its worker was started by."""
    pid: int = 0
    """Its worker's process."""
    heartbeat: outcome.Heartbeat | None = None
    trains: bool = False
    """It has made its first step."""
    error: dict[str, Any] | None = None
    """The error event that its worker sent before it ended."""
    stop_signal: int | None = None
    """The signal of its own that told its worker to end."""
    agent_lost: bool = False
    """The agent in its slot is gone, so the slot needs another."""
    exit: outcome.WorkerExit | None = None


def group_by_host(agents: Sequence[Any], infos: Sequence[SlotInfo]) -> list[HostStatus]:
    """The hosts of an attempt with their ranks, in the order of these, from the slot of each rank."""
    hosts: dict[str, HostStatus] = {}
    for rank, (agent, info) in enumerate(zip(agents, infos, strict=True)):
        host = hosts.setdefault(info.node, HostStatus(agent, info))
        host.ranks.append(RankStatus(rank, host, info))
    return list(hosts.values())


class HealthMonitor:
    """Judges the ranks of one attempt while they live."""

    def __init__(self, job: Job, hosts: Sequence[HostStatus]) -> None:
        cluster = job.config.cluster
        self.job, self.hosts = job, hosts
        self.ranks = sorted((status for host in hosts for status in host.ranks), key=lambda status: status.rank)
        self.limits = hang_detector.HangLimits(cluster.hang_timeout, cluster.start_timeout)
        self.stragglers = hang_detector.StragglerDetector()
        self.written: dict[int, float] = {}
        self.written_at = -math.inf
        """When a line of ``ranks.jsonl`` was written last (monotonic), and of which window."""
        self.slow_clocks = SlowClockDetector()
        self.devices: dict[int, GpuState] = {}
        """The GPU of each rank, as it was last asked for."""
        self.device_questions: list[Any] = []
        self.devices_asked = time.monotonic()
        self.checked = 0.0
        """When the ranks were last checked (monotonic)."""

    def diagnose(self) -> outcome.Diagnosis | None:
        """Why the living ranks cannot go on, if they cannot: one is cut off, or they hang. Also reports slow ranks."""
        now = time.monotonic()
        if now < self.checked + TICK_S:  # asked after every answer, and there may be thousands of ranks
            return None
        if now > self.checked + DRIVER_PAUSE_S:  # the driver itself was stopped, and heard nobody
            for host in self.hosts:
                host.answered = now
        self.checked = now
        for host in self.hosts:
            silent_s = now - host.answered if host.answered is not None else 0.0
            if silent_s > self.limits.hang_s and host.living:
                description = f"was cut off: its host has not answered for {silent_s:.0f} s"
                return outcome.Diagnosis("network lost", host.living[0].rank, description)
        living = [status for host in self.hosts for status in host.living]
        heartbeats = [status.heartbeat for status in living if status.heartbeat is not None]
        complete = len(heartbeats) == len(living)
        diagnosis = hang_detector.diagnose_hang(heartbeats, self.limits) if complete else None
        if diagnosis is not None:
            return self._explain_hang(diagnosis, heartbeats)
        slow_ranks, window = self.stragglers.find_slow(heartbeats, now), self.stragglers.step_s
        if window and window is not self.written and now > self.written_at + STEPS_WRITTEN_S:
            self.written, self.written_at = window, now
            line = {"step": max(heartbeat.step for heartbeat in heartbeats), **hang_detector.summarise_steps(window)}
            with RunDir(self.job.run_dir).ranks.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")
        if slow_ranks:
            ratios = sorted(ratio for _, ratio in slow_ranks)
            times = " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (ratios[0], ratios[-1])))
            self._show_slow(
                [rank for rank, _ in slow_ranks], "it works", "they work", f"{times} times as long as the others"
            )
        self._check_clocks(now)
        return None

    def _check_clocks(self, now: float) -> None:
        """Asks for all ranks' GPUs now and then, and reports those that are held at a lower clock than the others."""
        if self.device_questions:
            ready, _ = ray.wait(self.device_questions, num_returns=len(self.device_questions), timeout=0)
            if len(ready) < len(self.device_questions) and now < self.devices_asked + DEVICE_CHECK_S:
                return
            self.device_questions, self.devices = [], {}
            for question in ready:
                states = _answer(question)
                self.devices |= {rank: GpuState(**state) for rank, state in states.items() if state is not None}
            if slow_ranks := self.slow_clocks.find_slow(self.devices):
                self._show_slow(slow_ranks, "its GPU runs", "their GPUs run", "at a lower clock than the others")
        elif now > self.devices_asked + DEVICE_CHECK_S:
            self.devices_asked = now
            living = [host for host in self.hosts if host.info.gpus and host.living]
            self.device_questions = [host.agent.read_devices.remote() for host in living]

    def _show_slow(self, ranks: Sequence[int], one: str, many: str, how: str) -> None:
        """Reports slow ranks, in one note however many they are: "rank 3 on a is slow: it works 2 times ..."."""
        status = self.ranks[ranks[0]]
        if len(ranks) > 1:
            hosts = {self.ranks[rank].info.host for rank in ranks}
            where = next(iter(hosts)) if len(hosts) == 1 else plural(len(hosts), "host")
            text = f"{hang_detector.format_ranges(ranks)} on {where} are slow: {many} {how}"
        else:
            speed = describe_speed(self.devices[status.rank]) if status.rank in self.devices else ""
            device = f" (GPU {','.join(status.info.gpus)}: {speed})" if speed else ""
            text = f"rank {status.rank} on {status.info.host} is slow: {one} {how}{device}"
        self.job.show(NoteEvent(text).to_json())

    def _explain_hang(self, diagnosis: outcome.Diagnosis, heartbeats: Sequence[outcome.Heartbeat]) -> outcome.Diagnosis:
        """Has the ranks write their stacks and last collectives, which are gone once they are killed.

        The diagnosis with what these and their GPUs say.
        """
        questions = [host.agent.inspect_workers.remote() for host in self.hosts if host.living]
        answered, _ = ray.wait(questions, num_returns=len(questions), timeout=INSPECT_S)
        answers: dict[int, dict[str, Any]] = {}
        for question in answered:
            answers |= ray.get(question)
        records, faults = {}, {}
        for rank, answer in answers.items():
            groups = [GroupRecord.from_json(record) for record in answer["flight"]]
            if groups:
                records[rank] = groups
            fault = classify("", DeviceEvidence.from_json(answer["evidence"])) if "evidence" in answer else None
            if fault is not None:
                faults[rank] = fault
        diagnosis = hang_detector.refine_diagnosis(diagnosis, heartbeats, find_stuck(records), faults)
        return replace(diagnosis, evidence=(*diagnosis.evidence, *_places(answers, diagnosis.rank)))


def _answer(question: Any) -> dict[int, dict[str, Any] | None]:
    """An agent's answer; none where the agent is gone, which its polls tell better."""
    try:
        answer: dict[int, dict[str, Any] | None] = ray.get(question)
        return answer
    except ray.exceptions.RayError:
        return {}


def _places(answers: Mapping[int, dict[str, Any]], culprit: int | None) -> list[str]:
    """Lines with the culprit's device and stack, or with the top of each rank's where none can be blamed."""
    if culprit is None:
        lines = []
        for rank, answer in sorted(answers.items())[:MOST_RANKS]:
            lines += [f"rank {rank}:", *(f"  {frame}" for frame in answer["stack"][:3])]
        return lines
    answer = answers.get(culprit, {"kernel": ["not known: its steward did not answer"], "stack": []})
    device = describe_evidence(DeviceEvidence.from_json(answer.get("evidence", {})))
    kernel = [f"kernel: {line}" for line in answer["kernel"]]
    stack = [f"  {frame}" for frame in answer["stack"]]
    return [*device, *kernel, "", "its stack, innermost first:", *(stack or ["  it could not write it"])]


def heartbeat_of(record: dict[str, Any]) -> outcome.Heartbeat:
    """The heartbeat in an agent's record of its worker, typed."""
    fields = outcome.Heartbeat.__dataclass_fields__
    return outcome.Heartbeat(**{key: value for key, value in record.items() if key in fields})
