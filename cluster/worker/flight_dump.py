"""Writes a worker's flight record when its agent asks for it, whatever the main thread waits in.

The request is SIGUSR2, which every thread of the worker blocks but one that does nothing else than wait for it: a rank
that hangs in a collective or in CUDA runs no signal handler of Python.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d as c10d

from train.util.io import write_whole

REQUEST = signal.SIGUSR2
RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""torch's functions that return a recorder's content, of those there are in this build: NCCL's, and gloo's."""


def serve_requests(path: Path) -> None:
    """Starts the thread that writes the record to ``path`` at each request; to be called before any other starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [REQUEST])
    threading.Thread(target=_serve, args=(path,), daemon=True).start()


def _serve(path: Path) -> None:
    while True:
        signal.sigwait([REQUEST])
        with contextlib.suppress(OSError):
            write_whole(path, b"\n".join(dump_recorders()) + b"\n")


def dump_recorders() -> list[bytes]:
    """The content of each of torch's recorders, as JSON."""
    dumps = [getattr(c10d, name, None) for name in RECORDERS]
    return [_as_bytes(dump(includeCollectives=True, onlyActive=False)) for dump in dumps if dump is not None]


def _as_bytes(dump: Any) -> bytes:
    return dump if isinstance(dump, bytes) else str(dump).encode()
