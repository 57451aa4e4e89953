"""Watches the living ranks of an attempt: which are silent, hang or lag, with their stacks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from train.util.io import to_json
from train.util.run_layout import RunDir

STEPS_WRITTEN_S = 10.0
"""Between lines of ``ranks.jsonl``, at least."""
MOST_RANKS = 6
"""Ranks whose stacks are shown in short where none can be blamed."""


@dataclass
class RankStatus:
    """One rank of an attempt, as far as the driver knows."""

    rank: int
    agent: Any
    """Handle of its Ray actor."""
    info: SlotInfo
    order: StartOrder | None = None
    """What its worker was started by."""
    pid: int = 0
    """Its worker's process."""
    heartbeat: outcome.Heartbeat | None = None
    answered: float | None = None
    """When its agent last answered a poll (monotonic)."""
    trains: bool = False
    """It has made its first step."""
    error: dict[str, Any] | None = None
    """The error event that its worker sent before it ended."""
    stop_signal: int | None = None
    """The signal of its own that told its worker to end."""
    unreachable: tuple[float, Exception] | None = None
    """Since when its agent has not answered (monotonic), and how Ray says so."""
    agent_lost: bool = False
    """Its agent is gone, so its slot needs another."""
    exit: outcome.WorkerExit | None = None

    @property
    def living(self) -> bool:
        """Whether the worker has not ended, as far as is known, and its agent answers."""
        return self.exit is None and self.unreachable is None


class HealthMonitor:
    """Judges the ranks of one attempt while they live."""

    def __init__(self, job: Job, ranks: Sequence[RankStatus]) -> None:
        cluster = job.config.cluster
        self.job, self.ranks = job, ranks
        self.limits = hang_detector.HangLimits(cluster.hang_timeout, cluster.start_timeout)
        self.stragglers = hang_detector.StragglerDetector()
        self.written: dict[int, float] = {}
        self.written_at = -math.inf
        """When a line of ``ranks.jsonl`` was written last (monotonic), and of which window."""
        self.slow_clocks = SlowClockDetector()
        self.devices: dict[int, GpuState] = {}
        """The GPU of each rank, as it was last asked for."""
        self.device_questions: dict[Any, int] = {}
        self.devices_asked = time.monotonic()
        self.checked = 0.0
        """When the ranks were last checked (monotonic)."""

    def diagnose(self) -> outcome.Diagnosis | None:
        """Why the living ranks cannot go on, if they cannot: one is cut off, or they hang. Also reports slow ranks."""
        now = time.monotonic()
        if now < self.checked + TICK_S:  # asked after every answer, and there may be thousands of ranks
            return None
        if now > self.checked + DRIVER_PAUSE_S:  # the driver itself was stopped, and heard nobody
            for status in self.ranks:
                status.answered = now
        self.checked = now
        living = [status for status in self.ranks if status.living]
        silent_s = {status.rank: now - status.answered for status in living if status.answered is not None}
        silent = [rank for rank, seconds in silent_s.items() if seconds > self.limits.hang_s]
        if silent:
            description = f"was cut off: its host has not answered for {silent_s[silent[0]]:.0f} s"
            return outcome.Diagnosis("network lost", silent[0], description)
        heartbeats = [status.heartbeat for status in living if status.heartbeat is not None]
        complete = len(heartbeats) == len(living)
        diagnosis = hang_detector.diagnose_hang(heartbeats, self.limits) if complete else None
        if diagnosis is not None:
            return self._explain_hang(diagnosis, living, heartbeats)
        slow_ranks, window = self.stragglers.find_slow(heartbeats, now), self.stragglers.step_s
        if window and window is not self.written and now > self.written_at + STEPS_WRITTEN_S:
            self.written, self.written_at = window, now
            line = {"step": max(heartbeat.step for heartbeat in heartbeats), **hang_detector.summarise_steps(window)}
            with RunDir(self.job.run_dir).ranks.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")
        for rank, ratio in slow_ranks:
            self._show_slow(rank, f"it works {ratio:.1f} times as long as the others")
        self._check_clocks(now)
        return None

    def _check_clocks(self, now: float) -> None:
        """Asks for all ranks' GPUs now and then, and reports those that are held at a lower clock than the others."""
        if self.device_questions:
            ready, _ = ray.wait(list(self.device_questions), num_returns=len(self.device_questions), timeout=0)
            if len(ready) < len(self.device_questions) and now < self.devices_asked + DEVICE_CHECK_S:
                return
            answers = {self.device_questions[question]: _answer(question) for question in ready}
            self.device_questions = {}
            self.devices = {rank: GpuState(**state) for rank, state in answers.items() if state is not None}
            for rank in self.slow_clocks.find_slow(self.devices):
                self._show_slow(rank, "its GPU runs at a lower clock than the others")
        elif now > self.devices_asked + DEVICE_CHECK_S:
            self.devices_asked = now
            living = [status for status in self.ranks if status.living and status.info.gpus]
            self.device_questions = {status.agent.read_device.remote(): status.rank for status in living}

    def _show_slow(self, rank: int, why: str) -> None:
        status = self.ranks[rank]
        speed = describe_speed(self.devices[rank]) if rank in self.devices else ""
        device = f" (GPU {','.join(status.info.gpus)}: {speed})" if speed else ""
        self.job.show(NoteEvent(f"rank {rank} on {status.info.host} is slow: {why}{device}").to_json())

    def _explain_hang(
        self, diagnosis: outcome.Diagnosis, living: Sequence[RankStatus], heartbeats: Sequence[outcome.Heartbeat]
    ) -> outcome.Diagnosis:
        """Has the ranks write their stacks and last collectives, which are gone once they are killed.

        The diagnosis with what these and their GPUs say.
        """
        questions = {status.agent.inspect_worker.remote(): status.rank for status in living}
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=INSPECT_S)
        answers = {questions[question]: ray.get(question) for question in answered}
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


def _answer(question: Any) -> Any:
    """An agent's answer; None where the agent is gone, which its polls tell better."""
    try:
        return ray.get(question)
    except ray.exceptions.RayError:
        return None


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
