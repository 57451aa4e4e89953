"""One job a run folder, one driver a sweep: it holds a lock on its folder for as long as it lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from train.errors import UserError
from train.util.io import FileLock
from train.util.run_layout import RunDir


def take(run_dir: Path) -> FileLock:
    """Makes the run's folder and locks it: keep the lock. UserError says who holds it, or why it cannot be
    written.
    """
    try:
        RunDir(run_dir).logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, "run.dir", error) from error
    return hold(RunDir(run_dir).lock, "run.dir")


def hold(place: Path, key: str) -> FileLock:
    """Locks the file ``place`` in the folder that ``key`` names: as above."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
    except OSError as error:
        raise _unwritable(place.parent, key, error) from error
    if not lock.acquire(wait=False):
        lock.close()
        raise UserError(f"{key}={place.parent} is in use by {_holder(place)}. Wait for it, or give another {key}")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    lock.write(json.dumps(who))
    return lock


def take_back(run_dir: Path) -> None:
    """Removes what ``take`` made, while it is locked, where nothing else has come into the folder."""
    run = RunDir(run_dir)
    with contextlib.suppress(OSError):
        if {path.name for path in run_dir.iterdir()} == {run.lock.name, run.logs.name}:
            run.logs.rmdir()
            run.lock.unlink()
            run_dir.rmdir()


def _unwritable(folder: Path, key: str, error: OSError) -> UserError:
    return UserError(f"{key}={folder} cannot be written: {error.strerror}. Give another with {key}=...")


def _holder(place: Path) -> str:
    try:
        who = json.loads(place.read_text())
        return f"another job: pid {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another job"
