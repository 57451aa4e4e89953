"""Files as they are found in folders of runs: what can be read of them is read, and the rest becomes a note."""

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

FRESH_FILES_S = 120.0
"""What has its driver on another host counts as running while its files are younger than this."""


def finite_number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def read_json_object(file: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, with a note where there is something else."""
    try:
        value = json.loads(file.read_text("utf-8"))
        if isinstance(value, dict):
            return value
        notes.append(f"{file.name} holds no object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError):
        notes.append(f"{file.name} cannot be read")
    return {}


def read_json_lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; other lines are counted in a note, but for a last one that a crash cut short."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{file.name} cannot be read: {error.strerror}")
        return []
    found, bad = [], 0
    for line in lines[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    if bad:
        notes.append(f"{file.name}: {bad} damaged {'line' if bad == 1 else 'lines'} left out")
    return found


def is_locked(lock: Path, written: Sequence[Path]) -> bool:
    """Whether a driver holds ``lock``: asked of the kernel where it is on this host, so that nothing is touched; else judged by
    how old the files are that it has ``written``.
    """
    try:
        about = json.loads(lock.read_text())
        here = about["host"] == socket.gethostname()
        inode = lock.stat().st_ino
        if here and Path("/proc/locks").exists():
            return any(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())
        return time.time() - max(p.stat().st_mtime for p in written if p.exists()) < FRESH_FILES_S
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def display_path(folder: Path) -> str:
    """A folder as a person here would type it."""
    with contextlib.suppress(ValueError):
        return str(folder.resolve().relative_to(Path.cwd()))
    return os.fspath(folder)
