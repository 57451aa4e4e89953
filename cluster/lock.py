"""One job a run folder: the driver holds a lock on it for as long as it lives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from train.errors import UserError


def take(run_dir: Path) -> IO[str]:
    """Makes the run's folder and locks it: keep the file open. UserError says who holds it, or why it cannot be
    written.
    """
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("a+")
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error.strerror}. Give another with run.dir=...") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run.dir={run_dir} is in use by {_holder(run_dir)}. Wait for it, or give another run.dir") from None
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def take_back(run_dir: Path) -> None:
    """Removes what ``take`` made, while it is locked, where nothing else has come into the folder."""
    with contextlib.suppress(OSError):
        if {path.name for path in run_dir.iterdir()} == {"lock", "logs"}:
            (run_dir / "logs").rmdir()
            (run_dir / "lock").unlink()
            run_dir.rmdir()


def _holder(run_dir: Path) -> str:
    try:
        who = json.loads((run_dir / "lock").read_text())
        return f"another job: pid {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another job"
