"""Starts a host's fork server, owns it, and connects to it; light, for a driver imports this first.

Whoever needs the fork server first starts it and owns it: the driver on its own machine, while Ray is still coming up;
a worker agent on another host.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.host import job_dir
from train.util.io import FileLock

BEFORE_FORK_ENV = {
    "DS_BUILD_OPS": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
}
"""The fork server's environment: no thread pools and no CUDA before the fork. A worker's threads are set after it."""
ALLOCATOR_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Settings of glibc's allocator, unless the caller has others: a worker keeps the memory that a step has freed.

By default much of it goes back to the kernel, and the next step faults it in again, a page at a time: a sixth of a
step of a small model on a CPU.
"""

ORPHAN_S = 0.5
"""How long a worker outlives its agent: a signal to everybody may reach the fork server after the agent."""
ORPHAN_CHECK_S = 0.1
"""Between the fork server's looks at workers without an agent."""


class ForkServerProcess:
    """Owner of a fork server, which lives until ``close``, or until this process ends in any way."""

    MODULE = "cluster.worker.fork_server"
    """The module that is run."""

    def __init__(self, folder: Path, target: str) -> None:
        """Starts it in the job folder ``folder``; each of its workers will run ``target`` (module:function)."""
        path = folder / "warm.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(128)
        with listener, (folder / "warm.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.MODULE, target, str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                env={**ALLOCATOR_ENV, **os.environ, **BEFORE_FORK_ENV, "TMPDIR": job_dir.temporary_files(folder)},
                start_new_session=True,  # Ctrl-C on the terminal is the driver's to handle
            )

    def set_device(self, device: str) -> None:
        """Says whether the workers will run on "cpu" or "gpu"; the fork server waits for it between two imports."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{device}\n".encode())
                self.process.stdin.flush()

    def close(self) -> None:
        """Ends the fork server, and with it every worker that it forked, and its spare."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()  # what the spare lives by
        self.process.kill()
        self.process.wait()


def connect_fork_server(folder: Path) -> socket.socket | None:
    """A connection to the host's fork server, or None where none lives."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(folder / "warm.sock"))
    except OSError:
        sock.close()
        return None
    return sock


@contextlib.contextmanager
def start_lock(folder: Path) -> Iterator[None]:
    """Keeps two agents of a host from starting two fork servers at once."""
    with FileLock(folder / "starting"):
        yield
