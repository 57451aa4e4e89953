"""Decides the outcome of an attempt, and the first cause of a failure, from the exits of its ranks.

When one rank dies, the others fail within moments because it is gone. Their errors are collateral: counted, not shown.
All functions are pure.
"""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.device_health.device_fault import DeviceFault, classify
from cluster.device_health.evidence import DeviceEvidence
from train.errors import ExitCode

Fault = Literal[
    "killed",
    "raised",
    "hung",
    "host lost",
    "network lost",
    "worker lost",
    "preempted",
    "out of host memory",
    "out of device memory",
    "device",
    "not finite",
]
"""Kinds of failure. "worker lost": the rank's agent or its host's fork server ended, and the worker with them.
"device": its GPU failed, and the run is to go on without that.
"""

COLLATERAL = re.compile(
    r"Connection (closed|reset)|Broken pipe|closed by peer|Connection refused"
    r"|DistBackendError|DistNetworkError|DistStoreError"
    r"|ProcessGroup|NCCL error|Gloo|gloo/transport|[Tt]imed out waiting|Socket [Tt]imeout|recvValue failed"
)
"""Errors that torch raises when a peer has gone. A rank whose last error matches is taken for a victim."""
DEVICE_MEMORY = re.compile(
    r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CU\w+_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
PROVEN, OWN, ABORTED, COLLATERAL_ERROR, KILLED_BY_DRIVER = range(5)
"""How likely an exit is the consequence of another; the least likely is the cause."""
HOST_MEMORY = re.compile(
    r"^MemoryError|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory", re.MULTILINE
)


@dataclass(frozen=True)
class Heartbeat:
    """A rank's progress at one moment: its record (``train.distributed.heartbeat``) and its process's state."""

    rank: int
    step: int
    phase: str
    micro: int = 0
    collective: str = ""
    """Name of the last collective that the rank has begun."""
    count: int = 0
    """Collectives that it has begun so far."""
    inside: bool = False
    """Whether the last one has not yet ended."""
    still_s: float = 0.0
    """Seconds since any field of the record changed."""
    longest_s: float = 0.0
    """The longest time that this phase has taken so far; 0: the rank has not yet been through it."""
    busy_s: float = 0.0
    """Seconds that the rank has worked on steps, without its waits for others."""
    state: str = "S"
    """Letter of the process's state, see proc(5)."""
    rss_mib: int = 0

    @property
    def stopped(self) -> bool:
        """Whether the kernel keeps the process from running at all."""
        return self.state in ("T", "t")

    @property
    def where(self) -> str:
        """The phase and step in words: "in backward of step 12"."""
        if self.phase in ("start", "end"):
            return {"start": "while starting", "end": "while finishing"}[self.phase]
        part = f", micro-batch {self.micro + 1}" if self.micro else ""
        return f"in {self.phase} of step {self.step}{part}"


@dataclass(frozen=True)
class WorkerExit:
    """How the worker of one rank ended. ``order`` counts an attempt's exits as the driver learned of them, from 0."""

    rank: int
    order: int
    code: int
    host: str = ""
    pid: int = 0
    error: str | None = None
    """The traceback, or the message of bad input, that the rank sent before it ended."""
    kind: str = "exception"
    """Kind of the error: "exception", "user" for bad input, "not_finite", "device" by the preflight."""
    tail: tuple[str, ...] = ()
    """Last lines of its log."""
    peak_mib: int | None = None
    memory_mib: int | None = None
    oom: int = 0
    """Out-of-memory kills on its host while it ran."""
    killed_by_driver: bool = False
    """Whether the driver killed it, for another rank's sake."""
    fault: Fault | None = None
    """Set, with ``description``, where not the worker ended first but its fork server, its agent or its host."""
    description: str = ""
    at: Heartbeat | None = None
    """Its last heartbeat."""
    gpu: str = ""
    """The number or UUID of the GPU that Ray gave it; empty on a CPU."""
    evidence: DeviceEvidence | None = None
    """What its host knows of that GPU."""

    @functools.cached_property
    def device_fault(self) -> DeviceFault | None:
        """The fault of its GPU that ended it, if it was one; a rank aborted by NCCL says so only in its log."""
        well = self.code in (ExitCode.OK, ExitCode.STOPPED) or self.kind == "user"
        if well or self.killed_by_driver or self.fault:
            return None
        if self.kind == "device":
            return DeviceFault(self.error or "")
        return classify(self.error or "\n".join(self.tail), self.evidence)

    @functools.cached_property
    def weight(self) -> int:
        """How likely it is the consequence of another exit, from PROVEN on; looked at after every exit of a job."""
        if self.killed_by_driver:
            return KILLED_BY_DRIVER
        device = self.device_fault
        if device is not None:
            return PROVEN if device.proven else OWN
        if self.code > 0 and self.error and COLLATERAL.search(self.error.strip().splitlines()[-1]):
            return COLLATERAL_ERROR
        return ABORTED if self.code == -signal.SIGABRT else OWN  # NCCL's watchdog aborts a rank whose peer is gone


@dataclass(frozen=True)
class Diagnosis:
    """Why living ranks cannot go on.

    ``rank``: whose fault it is, if that is clear; ``description`` continues "rank N ...".
    """

    fault: Fault
    rank: int | None
    description: str
    evidence: tuple[str, ...] = ()
    device: DeviceFault | None = None
    """The fault of that rank's GPU, where it hangs for that."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of an attempt; for a failure also its fault, its first cause and the ranks that fell with it."""

    kind: Literal["running", "done", "stopped", "bad_input", "failed"]
    fault: Fault | None = None
    cause: WorkerExit | None = None
    collateral: tuple[WorkerExit, ...] = ()
    diagnosis: Diagnosis | None = None

    @property
    def device_fault(self) -> DeviceFault | None:
        """The fault of the first cause's GPU, where the attempt failed for that."""
        if self.diagnosis is not None:
            return self.diagnosis.device
        return self.cause.device_fault if self.cause is not None and self.fault == "device" else None


def decide_outcome(
    exits: Sequence[WorkerExit], size: int, diagnosis: Diagnosis | None = None, told_to_stop: Collection[int] = ()
) -> Verdict:
    """The verdict on an attempt of ``size`` ranks, given its ``exits`` and the ``diagnosis`` it was ended for.

    ``told_to_stop``: ranks that were told to end by a signal of their own. Where these are not all, they were
    preempted.
    """
    preempted = 0 < len(told_to_stop) < size
    bad = [exited for exited in exits if exited.code not in (ExitCode.OK, ExitCode.STOPPED)]
    if diagnosis is not None:
        cause = next((exited for exited in exits if exited.rank == diagnosis.rank), None)
        return Verdict("failed", diagnosis.fault, cause, _rest(bad, cause), diagnosis)
    if bad:
        first = min(bad, key=lambda exited: (exited.weight, exited.order))
        fault = "preempted" if preempted and first.rank in told_to_stop else fault_of(first)
        refused = first.code == ExitCode.BAD_INPUT and first.error and fault != "device"
        return Verdict("bad_input" if refused else "failed", fault, first, _rest(bad, first))
    if len(exits) < size:
        return Verdict("running")
    if any(exited.code == ExitCode.STOPPED for exited in exits):
        return Verdict("stopped", "preempted" if preempted else None)
    return Verdict("done")


def first_cause_known(exits: Sequence[WorkerExit]) -> bool:
    """Whether an exit is certainly no consequence of another, so that no other rank need be waited for."""
    return any(exited.code not in (ExitCode.OK, ExitCode.STOPPED) and exited.weight <= OWN for exited in exits)


def fault_of(exited: WorkerExit) -> Fault:
    """The kind of failure that a bad exit shows, where the driver did not kill the worker."""
    if exited.fault:
        return exited.fault
    if exited.device_fault is not None:
        return "device"
    if exited.code < 0:
        return "out of host memory" if exited.code == -signal.SIGKILL and exited.oom else "killed"
    error = exited.error or ""
    if exited.kind == "not_finite":
        return "not finite"
    if DEVICE_MEMORY.search(error):
        return "out of device memory"
    if HOST_MEMORY.search(error):
        return "out of host memory"
    return "network lost" if exited.weight == COLLATERAL_ERROR else "raised"


def _rest(bad: Sequence[WorkerExit], cause: WorkerExit | None) -> tuple[WorkerExit, ...]:
    return tuple(sorted((exited for exited in bad if exited is not cause), key=lambda exited: exited.rank))
