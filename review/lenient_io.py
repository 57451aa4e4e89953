"""File readers that never raise: readable content is returned, and damage becomes a note."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.util.reading import UNREADABLE

FRESH_FILES_S = 120.0
"""A run whose driver is on another host counts as running while its files are younger than this."""


def finite_number(value: Any) -> float | None:
    """``value`` as a float if it is a finite number (booleans are not), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def read_json_object(file: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a JSON file. Empty if the file is missing; empty with a note if it holds anything else."""
    try:
        value = json.loads(file.read_bytes())
        if isinstance(value, dict):
            return value
        notes.append(f"{file.name} holds no object")
    except FileNotFoundError:
        pass
    except UNREADABLE:
        notes.append(f"{file.name} cannot be read")
    return {}


def read_json_lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file. Damaged lines are counted in a note, except a last line that a crash cut short."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{file.name} cannot be read: {error.strerror}")
        return []
    objects, damaged = [], 0
    for line in lines[:-1]:
        try:
            value = json.loads(line)
        except UNREADABLE:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{file.name}: {damaged} damaged {'line' if damaged == 1 else 'lines'} left out")
    return objects


def is_locked(lock: Path, written: Sequence[Path]) -> bool:
    """Whether a driver holds ``lock``.

    On the driver's own host the kernel's table of locks tells, so the lock is not touched. From another host, the age
    of the files that the driver has ``written`` decides.
    """
    try:
        holder = json.loads(lock.read_text("utf-8"))
        on_this_host = holder["host"] == socket.gethostname()
        inode = lock.stat().st_ino
        if on_this_host and Path("/proc/locks").exists():
            return any(f":{inode} " in line for line in Path("/proc/locks").read_text("utf-8").splitlines())
        return time.time() - max(p.stat().st_mtime for p in written if p.exists()) < FRESH_FILES_S
    except UNREADABLE:
        return False


def display_path(folder: Path) -> str:
    """The folder relative to the working directory if it lies inside it, else as given."""
    with contextlib.suppress(ValueError):
        return str(Path(os.path.realpath(folder)).relative_to(Path.cwd()))
    return os.fspath(folder)
