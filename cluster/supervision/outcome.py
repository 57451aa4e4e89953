"""From what was seen of the ranks to a verdict: done, stopped, bad input, or the failure that came first, and of what kind. Pure.

When one rank dies, the others fail within moments because it is gone. Their errors are collateral: counted, not shown.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

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
    "not finite",
]
"""What can befall a rank. "worker lost": its steward or its host's warm process ended, and it with them."""

COLLATERAL = re.compile(
    r"Connection (closed|reset)|Broken pipe|closed by peer|Connection refused"
    r"|DistBackendError|DistNetworkError|DistStoreError"
    r"|ProcessGroup|NCCL error|Gloo|gloo/transport|[Tt]imed out waiting|Socket [Tt]imeout|recvValue failed"
)
"""What torch says of a peer that went away. A rank whose last error matches is believed to be a victim."""
DEVICE_MEMORY = re.compile(
    r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CU\w+_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
HOST_MEMORY = re.compile(
    r"^MemoryError|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory", re.MULTILINE
)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank was doing when it was last looked at: its pulse (``train.distributed.heartbeat``) and its process's state."""

    rank: int
    step: int
    phase: str
    micro: int = 0
    collective: str = ""
    """The last one begun, and how many were; ``inside``: not yet ended."""
    count: int = 0
    inside: bool = False
    still_s: float = 0.0
    """Seconds since anything of this changed."""
    longest_s: float = 0.0
    """The longest time that this phase has taken so far; 0: the rank has not yet been through it."""
    busy_s: float = 0.0
    """Seconds that the rank has worked on steps, waiting for others left out."""
    state: str = "S"
    rss_mib: int = 0

    @property
    def stopped(self) -> bool:
        """Whether the kernel keeps the process from running at all."""
        return self.state in ("T", "t")

    @property
    def where(self) -> str:
        """In words: "in backward of step 12"."""
        if self.phase in ("start", "end"):
            return {"start": "while starting", "end": "while finishing"}[self.phase]
        part = f", micro-batch {self.micro + 1}" if self.micro else ""
        return f"in {self.phase} of step {self.step}{part}"


@dataclass(frozen=True)
class WorkerExit:
    """How one rank ended. ``order``: place among the ends, as the driver heard of them."""

    rank: int
    order: int
    code: int
    host: str = ""
    pid: int = 0
    error: str | None = None
    """The traceback, or the message of bad input, that the rank sent before it ended."""
    kind: str = "exception"
    """Of the error: "exception", "user" for bad input, "not_finite"."""
    tail: tuple[str, ...] = ()
    peak_mib: int | None = None
    memory_mib: int | None = None
    oom: int = 0
    killed_by_driver: bool = False
    """Whether the driver killed it, for another rank's sake."""
    fault: Fault | None = None
    """Set, with ``words``, where not the trainer but what held it ended: the warm process, the steward or the host."""
    words: str = ""
    at: Heartbeat | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What was seen of a world that still ran and cannot go on. ``rank``: whose fault it is, if that is clear; ``words`` go on
    from its name.
    """

    fault: Fault
    rank: int | None
    words: str
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What became of a world: ``kind``, and for a failure its fault, its first cause and the ranks that fell with it."""

    kind: Literal["running", "done", "stopped", "bad_input", "failed"]
    fault: Fault | None = None
    cause: WorkerExit | None = None
    collateral: tuple[WorkerExit, ...] = ()
    finding: Diagnosis | None = None


def decide_outcome(
    ends: Sequence[WorkerExit], size: int, finding: Diagnosis | None = None, asked: Collection[int] = ()
) -> Verdict:
    """The verdict over a world of ``size`` ranks of which ``ends`` have ended, after ``finding`` if there was one.

    ``asked``: ranks that were told to end by a signal of their own. Where these are not all, they were preempted.
    """
    preempted = 0 < len(asked) < size
    bad = [end for end in ends if end.code not in (ExitCode.OK, ExitCode.STOPPED)]
    if finding is not None:
        cause = next((end for end in ends if end.rank == finding.rank), None)
        return Verdict("failed", finding.fault, cause, _rest(bad, cause), finding)
    if bad:
        first = min(bad, key=lambda end: (_weight(end), end.order))
        fault = "preempted" if preempted and first.rank in asked else fault_of(first)
        refused = first.code == ExitCode.BAD_INPUT and first.error
        return Verdict("bad_input" if refused else "failed", fault, first, _rest(bad, first))
    if len(ends) < size:
        return Verdict("running")
    if any(end.code == ExitCode.STOPPED for end in ends):
        return Verdict("stopped", "preempted" if preempted else None)
    return Verdict("done")


def first_cause_known(ends: Sequence[WorkerExit]) -> bool:
    """Whether the first cause is among the ends already, so that nobody need be waited for."""
    return any(end.code not in (ExitCode.OK, ExitCode.STOPPED) and _weight(end) == 0 for end in ends)


def fault_of(end: WorkerExit) -> Fault:
    """The kind of a bad end that was not the driver's doing."""
    if end.fault:
        return end.fault
    if end.code < 0:
        return "out of host memory" if end.code == -signal.SIGKILL and end.oom else "killed"
    error = end.error or ""
    if end.kind == "not_finite":
        return "not finite"
    if DEVICE_MEMORY.search(error):
        return "out of device memory"
    if HOST_MEMORY.search(error):
        return "out of host memory"
    return "network lost" if _weight(end) == 2 else "raised"


def _rest(bad: Sequence[WorkerExit], cause: WorkerExit | None) -> tuple[WorkerExit, ...]:
    return tuple(sorted((end for end in bad if end is not cause), key=lambda end: end.rank))


def _weight(end: WorkerExit) -> int:
    """How likely an end is another's consequence; the least likely is the cause."""
    if end.killed_by_driver:
        return 3
    if end.code > 0 and end.error and COLLATERAL.search(end.error.strip().splitlines()[-1]):
        return 2
    return int(end.code == -signal.SIGABRT)  # NCCL's watchdog aborts a rank whose peer is gone
