"""From the ends of the ranks to a verdict: done, stopped, bad input, or the failure that came first. Pure.

When one rank dies, the others fail within moments because it is gone. Their errors are collateral: counted, not shown.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

STOPPED, BAD_INPUT = 75, 2

COLLATERAL = re.compile(
    r"Connection (closed|reset)|Broken pipe|closed by peer|Connection refused"
    r"|DistBackendError|DistNetworkError|DistStoreError"
    r"|ProcessGroup|NCCL error|Gloo|gloo/transport|[Tt]imed out waiting|Socket [Tt]imeout|recvValue failed"
)
"""What torch says of a peer that went away. A rank whose last error matches is believed to be a victim."""


@dataclass(frozen=True)
class End:
    """How one rank ended. ``order``: place among the ends, as the driver heard of them."""

    rank: int
    order: int
    code: int
    host: str = ""
    pid: int = 0
    error: str | None = None
    """The traceback, or the message of bad input, that the rank sent before it ended."""
    tail: tuple[str, ...] = ()
    peak_mib: int | None = None
    memory_mib: int | None = None
    oom: int = 0
    ours: bool = False
    """Whether the driver killed it, for another rank's sake."""
    lost: str | None = None
    """Set where not the trainer but what held it ended: the warm process, the steward or the host."""


@dataclass(frozen=True)
class Verdict:
    """What became of a world: ``kind``, and for a failure its first cause and the ranks that fell with it."""

    kind: Literal["running", "done", "stopped", "bad_input", "failed"]
    cause: End | None = None
    collateral: tuple[End, ...] = field(default=())


def judge(ends: Sequence[End], size: int) -> Verdict:
    """The verdict over a world of ``size`` ranks of which ``ends`` have ended."""
    bad = [end for end in ends if end.code not in (0, STOPPED)]
    if bad:
        first = min(bad, key=lambda end: (_weight(end), end.order))
        rest = tuple(sorted((end for end in bad if end is not first), key=lambda end: end.rank))
        kind: Literal["bad_input", "failed"] = "bad_input" if first.code == BAD_INPUT and first.error else "failed"
        return Verdict(kind, first, rest)
    if len(ends) < size:
        return Verdict("running")
    return Verdict("stopped" if any(end.code == STOPPED for end in ends) else "done")


def _weight(end: End) -> int:
    """How likely an end is another's consequence; the least likely is the cause."""
    if end.ours:
        return 3
    if end.code > 0 and end.error and COLLATERAL.search(end.error.strip().splitlines()[-1]):
        return 2
    return 0


def how(end: End) -> str:
    """In a few words, how a rank ended."""
    if end.lost:
        return end.lost
    if end.code < 0:
        name = signal.Signals(-end.code).name
        if end.code == -signal.SIGKILL and end.oom:
            return f"killed by {name}: the kernel was out of memory"
        return f"killed by {name}"
    if end.error:
        return "raised " + end.error.strip().splitlines()[-1].split(":")[0]
    return f"exited with code {end.code} without a word"


def explain(verdict: Verdict) -> list[str]:
    """The block that a failure prints: the first line names rank, host, pid and cause; evidence; then the others, in
    one line.
    """
    end = verdict.cause
    if end is None:
        return []
    where = f"rank {end.rank}" + (f" on {end.host}" if end.host else "") + (f" (pid {end.pid})" if end.pid else "")
    lines = [f"{where} {how(end)}"]
    if end.peak_mib and end.code == -signal.SIGKILL:
        lines.append(f"it held at most {end.peak_mib:,} MiB of the host's {end.memory_mib or 0:,} MiB; {_oom(end)}")
    if end.code == -signal.SIGBUS:
        lines.append("a file that it read as memory was cut short: a shard of the corpus, or /dev/shm is full")
    if end.error and end.code > 0:
        lines += ["", *end.error.rstrip().splitlines()]
    elif end.tail:
        lines += ["", "the last lines of its log:", *(f"  {line}" for line in end.tail)]
    if verdict.collateral:
        ranks = ", ".join(str(e.rank) for e in verdict.collateral[:8]) + (", ..." if len(verdict.collateral) > 8 else "")
        many = len(verdict.collateral) > 1
        follow = "their errors follow" if many else "its error follows"
        lines += ["", f"rank{'s' if many else ''} {ranks} fell with it ({follow} from this one)"]
    return lines


def _oom(end: End) -> str:
    if end.oom:
        return "the kernel's out-of-memory killer was at work: use a smaller batch.micro, or fewer workers on this host"
    return "the kernel reports no lack of memory: somebody, or a resource manager, killed it"
