"""The block of lines that explains a failure: the first cause, its evidence, then the other ranks in one line; pure."""

from __future__ import annotations

import signal

from cluster.supervision.hang_detector import format_ranks
from cluster.supervision.outcome import Verdict, WorkerExit

MOST_LINES = 24
"""Lines of a traceback that are shown at most, the innermost ones; the rank's log has all."""

CURES = {
    "out of host memory": "use a smaller batch.micro, fewer workers on this host, or zero=3",
    "out of device memory": "use a smaller batch.micro, zero=2 or zero=3, or model.checkpoint_activations=true",
    "network lost": "look at the hosts' network: no rank ended by itself, yet they lost each other",
}


def explain(verdict: Verdict) -> list[str]:
    """The lines of a failure's block, of which the first names rank, host, process and cause; none without a failure."""
    if verdict.diagnosis is not None:
        lines = [_title(verdict.cause, verdict.diagnosis.description), *verdict.diagnosis.evidence]
    elif verdict.cause is not None:
        lines = [_title(verdict.cause, describe_exit(verdict.cause)), *_evidence(verdict.cause, verdict.fault or "")]
    else:
        return []
    if verdict.fault in CURES:
        lines += ["", f"cure: {CURES[verdict.fault]}"]
    if verdict.collateral:
        why = "their errors follow" if len(verdict.collateral) > 1 else "its error follows"
        killed = all(end.killed_by_driver for end in verdict.collateral)
        lines += [
            "",
            f"{format_ranks(verdict.collateral)} fell with it ({'ended by the driver' if killed else f'{why} from this one'})",
        ]
    return lines


def describe_exit(end: WorkerExit) -> str:
    """How a rank ended, continuing "rank N ...": killed by which signal, raised what, and where."""
    at = f" {end.at.where}" if end.at else ""
    if end.description:
        return end.description + at
    if end.code < 0:
        memory = ": the kernel was out of memory" if end.code == -signal.SIGKILL and end.oom else ""
        return f"killed by {signal.Signals(-end.code).name}{at}{memory}"
    if end.error:
        return f"raised {_last_line(end.error).split(':')[0]}{at}"
    return f"exited with code {end.code} without a word{at}"


def signature(verdict: Verdict) -> str:
    """A text that is equal for two failures of the same kind: pids, addresses and counts are blanked out."""
    words = verdict.diagnosis.description if verdict.diagnosis else ""
    if verdict.cause and not words:
        words = _last_line(verdict.cause.error) if verdict.cause.error else f"code {verdict.cause.code}"
    return f"{verdict.fault}: " + "".join("#" if letter.isdigit() else letter for letter in words)


def _title(end: WorkerExit | None, words: str) -> str:
    if end is None:
        return words
    host, pid = f" on {end.host}" if end.host else "", f" (pid {end.pid})" if end.pid else ""
    return f"rank {end.rank}{host}{pid} {words}"


def _evidence(end: WorkerExit, fault: str) -> list[str]:
    lines = []
    if end.peak_mib and (end.code == -signal.SIGKILL or fault == "out of host memory"):
        oom = "the kernel's out-of-memory killer was at work" if end.oom else "the kernel reports no lack of memory"
        who = "" if end.oom or end.code > 0 else ": somebody, or a resource manager, killed it"
        lines.append(f"it held at most {end.peak_mib:,} MiB of the host's {end.memory_mib or 0:,} MiB; {oom}{who}")
    if end.code == -signal.SIGBUS:
        lines.append("a file that it read as memory was cut short: a shard of the corpus, or /dev/shm is full")
    if end.error and end.code > 0:
        shown = end.error.rstrip().splitlines()
        cut = [f"  ... ({len(shown) - MOST_LINES} lines more in its log)"] if len(shown) > MOST_LINES else []
        lines += ["", *cut, *shown[-MOST_LINES:]]
    elif end.tail:
        lines += ["", "the last lines of its log:", *(f"  {line}" for line in end.tail)]
    return lines


def _last_line(error: str) -> str:
    return error.strip().splitlines()[-1]
