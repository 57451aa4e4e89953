"""The lines that explain a failure: first cause, its evidence, the other ranks in one line; pure."""

from __future__ import annotations

import signal

from cluster.device_health.evidence import describe_evidence
from cluster.supervision.hang_detector import format_ranks
from cluster.supervision.outcome import Verdict, WorkerExit

MOST_LINES = 24
"""Lines of a traceback that are shown at most, the innermost ones; the rank's log has all."""

CURES = {
    "out of host memory": "use a smaller batch.micro, fewer workers on this host, or zero=3",
    "out of device memory": "use a smaller batch.micro, zero=2 or zero=3, or model.checkpoint_activations=true",
    "device": "the job leaves that device; have it reset or its host rebooted, and replaced if it comes again",
    "network lost": "look at the hosts' network: no rank ended by itself, yet they lost each other",
}


def explain(verdict: Verdict) -> list[str]:
    """The lines of a failure's block; the first names rank, host, process and cause. None without a failure."""
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
        killed = all(exited.killed_by_driver for exited in verdict.collateral)
        reason = "ended by the driver" if killed else f"{why} from this one"
        lines += ["", f"{format_ranks(verdict.collateral)} fell with it ({reason})"]
    return lines


def describe_exit(exited: WorkerExit) -> str:
    """How a rank ended, continuing "rank N ...": killed by which signal, raised what, and where."""
    at = f" {exited.at.where}" if exited.at else ""
    if exited.description:
        return exited.description + at
    device = exited.device_fault
    if device is not None:
        what = f"GPU {exited.gpu}" if exited.gpu else "device"
        return f"lost its {what}{at}: {device.reason}"
    if exited.code < 0:
        memory = ": the kernel was out of memory" if exited.code == -signal.SIGKILL and exited.oom else ""
        return f"killed by {signal.Signals(-exited.code).name}{at}{memory}"
    if exited.error:
        return f"raised {_last_line(exited.error).split(':')[0]}{at}"
    return f"exited with code {exited.code} without a word{at}"


def signature(verdict: Verdict) -> str:
    """A text that is equal for two failures of the same kind: pids, addresses and counts are blanked out."""
    text = verdict.diagnosis.description if verdict.diagnosis else ""
    if verdict.cause and not text:
        text = _last_line(verdict.cause.error) if verdict.cause.error else f"code {verdict.cause.code}"
    return f"{verdict.fault}: " + "".join("#" if letter.isdigit() else letter for letter in text)


def _title(exited: WorkerExit | None, text: str) -> str:
    if exited is None:
        return text
    host, pid = f" on {exited.host}" if exited.host else "", f" (pid {exited.pid})" if exited.pid else ""
    return f"rank {exited.rank}{host}{pid} {text}"


def _evidence(exited: WorkerExit, fault: str) -> list[str]:
    lines = describe_evidence(exited.evidence) if exited.evidence is not None else []
    if exited.peak_mib and (exited.code == -signal.SIGKILL or fault == "out of host memory"):
        oom = "the kernel's out-of-memory killer was at work" if exited.oom else "the kernel reports no lack of memory"
        who = "" if exited.oom or exited.code > 0 else ": somebody, or a resource manager, killed it"
        lines.append(
            f"it held at most {exited.peak_mib:,} MiB of the host's {exited.memory_mib or 0:,} MiB; {oom}{who}"
        )
    if exited.code == -signal.SIGBUS:
        lines.append("a file that it read as memory was cut short: a shard of the corpus, or /dev/shm is full")
    if exited.error and exited.code > 0:
        shown = exited.error.rstrip().splitlines()
        cut = [f"  ... ({len(shown) - MOST_LINES} lines more in its log)"] if len(shown) > MOST_LINES else []
        lines += ["", *cut, *shown[-MOST_LINES:]]
    elif exited.tail:
        lines += ["", "the last lines of its log:", *(f"  {line}" for line in exited.tail)]
    return lines


def _last_line(error: str) -> str:
    return error.strip().splitlines()[-1]
