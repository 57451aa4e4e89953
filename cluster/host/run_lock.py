"""Locks a run's or sweep's folder for the life of its driver, so that no second job writes into it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from train.errors import UserError
from train.util.io import FileLock
from train.util.reading import UNREADABLE
from train.util.run_layout import RunDir


def lock_run_dir(run_dir: Path) -> FileLock:
    """Makes the run's folder and locks it for as long as the returned lock lives.

    UserError names the job that holds the lock, or says why the folder cannot be written.
    """
    try:
        RunDir(run_dir).logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, "run.dir", error) from error
    return lock_file(RunDir(run_dir).lock, "run.dir")


def lock_file(path: Path, key: str) -> FileLock:
    """Locks the file ``path``, whose folder the configuration key ``key`` names; otherwise as ``lock_run_dir``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
    except OSError as error:
        raise _unwritable(path.parent, key, error) from error
    if not lock.acquire(wait=False):
        lock.close()
        raise UserError(f"{key}={path.parent} is in use by {_holder(path)}. Wait for it, or give another {key}")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    lock.write(json.dumps(who))
    return lock


def remove_empty_run_dir(run_dir: Path) -> None:
    """Removes the folder that ``lock_run_dir`` made, while it is locked, unless anything else was written into it."""
    run = RunDir(run_dir)
    with contextlib.suppress(OSError):
        if {path.name for path in run_dir.iterdir()} == {run.lock.name, run.logs.name}:
            run.logs.rmdir()
            run.lock.unlink()
            run_dir.rmdir()


def _unwritable(folder: Path, key: str, error: OSError) -> UserError:
    return UserError(f"{key}={folder} cannot be written: {error.strerror}. Give another with {key}=...")


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text("utf-8"))
        return f"another job: pid {holder['pid']} on {holder['host']}, since {holder['since']}"
    except UNREADABLE:
        return "another job"
