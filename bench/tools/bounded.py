"""Runs commands that may take only so long, and leaves none of their processes behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.tools.results import REPOSITORY
from cluster.worker import ipc

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 10.0
"""Seconds that a command has to end what it started, once it was interrupted."""
TICK_S = 0.5
KILL_S = 20.0
"""Seconds that the kernel may take to end killed processes: those that hold a GPU's memory are slow."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, None if it was ended at its time limit; and the seconds it took."""

    code: int | None
    seconds: float


@contextlib.contextmanager
def owning_descendants() -> Iterator[None]:
    """Context in which processes whose parents die become children of this process, so that it finds them all."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


def run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    limit_s: float,
    tick: Callable[[float], None] = lambda elapsed_s: None,
) -> Ended:
    """Runs a command in the repository for at most ``limit_s`` seconds, with its output in ``log``.

    No process is left after it. ``tick`` is called with the seconds so far. An exception, such as KeyboardInterrupt,
    ends the command as well.
    """
    before, parent, start_time = _descendants(), os.getpid(), time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C on the terminal is handled here
            preexec_fn=lambda: ipc.die_with_parent(parent),
        )
    code: int | None = None
    try:
        while code is None and (elapsed := time.monotonic() - start_time) < limit_s:
            tick(elapsed)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(min(TICK_S, max(0.01, limit_s - elapsed)))
    finally:
        _end(process, before)
    return Ended(code, time.monotonic() - start_time)


def _end(process: subprocess.Popen[bytes], before: set[psutil.Process]) -> None:
    """Interrupts the command, if it still runs, and kills what is left of all that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    deadline = time.monotonic() + KILL_S
    while (left := _descendants() - before) and time.monotonic() < deadline:
        for orphan in left:  # again and again: a parent may have started one meanwhile
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(left, TICK_S)
    process.wait()


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))
