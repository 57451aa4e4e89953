"""A run's folder as it is found: finished, running, stopped, broken or empty. Nothing in it is trusted and nothing raises."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COLUMNS = ("loss", "val_loss", "bits_per_byte", "tokens", "tokens_per_s", "grad_norm", "lr")
MARKS = ("config.yaml", "metrics.jsonl", "run.json", "summary.json", "lock")
"""What only a run's folder holds."""
FRESH_S = 120.0
"""A run whose driver is on another host counts as running while its files are younger than this."""
MOST_VALUES, MOST_BYTES = 5_000, 1 << 20
"""Of a configuration: more is no configuration of ours, and may be made to exhaust the reader."""


@dataclass
class Run:
    """What one folder tells."""

    folder: Path
    name: str
    state: str = "empty"
    """done, running, stopped, empty, broken or missing."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know: what is damaged, how the last start ended."""
    config: dict[str, Any] = field(default_factory=dict)
    """Flat: optimizer.lr -> 0.001."""
    steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, Floats] = field(default_factory=dict)
    """A value a logged step, each as long as ``steps``; not a number where there is none. ``seconds``: of training, so far."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    """run.json"""
    startup: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""

    @property
    def val_loss(self) -> float | None:
        """Held-out nats per token of all the held-out text, of a finished run; else the last one measured."""
        found = number(self.summary.get("val_loss"))
        if found is None and len(self.steps):
            measured = self.columns["val_loss"][~np.isnan(self.columns["val_loss"])]
            found = float(measured[-1]) if len(measured) else None
        return found

    @property
    def tokens(self) -> float | None:
        """Tokens trained on."""
        found = number(self.summary.get("tokens"))
        return found if found is not None or not len(self.steps) else number(self.columns["tokens"][-1])


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def find(places: list[Path]) -> list[Path]:
    """The run folders that ``places`` are or hold, two levels deep; a place that is neither is returned itself."""
    found: list[Path] = []
    for place in places:
        inner = [] if _is_run(place) else [p for pattern in ("*", "*/*") for p in sorted(place.glob(pattern)) if p.is_dir()]
        runs = [p for p in inner if _is_run(p)]
        empty = [p for p in inner if p.parent == place and not any(p in (r, *r.parents) for r in runs)]
        found += sorted(runs + empty, key=_natural) or [place]
    return list(dict.fromkeys(found))


def _natural(path: Path) -> list[tuple[int, str]]:
    """So that run2 comes before run10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", str(path))]


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def read(folder: Path) -> Run:
    """What ``folder`` tells, whatever is in it."""
    run = Run(folder, folder.resolve().name)
    if not folder.is_dir():
        run.state, run.notes = "missing", ["there is no such folder"]
        return run
    run.config = _config(run)
    run.name = str(run.config.get("run.name") or run.name)
    for name in ("summary", "startup", "environment"):
        setattr(run, name, _object(run, f"{name}.json"))
    run.kept = _object(run, "run.json")
    run.corpus = str(_object(run, "corpus.json").get("fingerprint") or "")
    _metrics(run)
    run.samples = [s for s in _lines(run, "samples.jsonl") if isinstance(s.get("step"), int)]
    run.state = _state(run)
    run.notes += _ends(folder) if run.state == "stopped" else []
    return run


def _state(run: Run) -> str:
    if _running(run.folder):
        return "running"
    if (number(run.summary.get("step")) or 0) >= (number(run.config.get("steps")) or 1):
        return "done"
    if len(run.steps):
        return "stopped"
    return "broken" if run.notes else "stopped" if run.config else "empty"


def _running(folder: Path) -> bool:
    """Whether the driver's lock is held: asked of the kernel where the driver is on this host, so that nothing is touched."""
    try:
        about = json.loads((folder / "lock").read_text())
        here = about["host"] == socket.gethostname()
        inode = (folder / "lock").stat().st_ino
        if here and Path("/proc/locks").exists():
            return any(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())
        newest = max(p.stat().st_mtime for p in (folder / "run.json", folder / "metrics.jsonl") if p.exists())
        return time.time() - newest < FRESH_S
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _ends(folder: Path) -> list[str]:
    """How the ranks of the last start ended, where they could still say it."""
    words = []
    for file in sorted((folder / "logs").glob("*.end")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            end = json.loads(file.read_text())
            if end.get("error"):
                words.append(f"{file.stem}: {str(end['error']).strip().splitlines()[-1]}")
    return words


def _config(run: Run) -> dict[str, Any]:
    file = run.folder / "config.yaml"
    try:
        if not file.exists():
            return {}
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        tree = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("no mapping")
        flat: dict[str, Any] = {}
        for key, value in _leaves(tree):
            flat[key] = value
            if len(flat) > MOST_VALUES:
                raise ValueError("too many values")
        return flat
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        run.notes.append(f"config.yaml cannot be read: {str(error).strip().splitlines()[0][:200]}")
        return {}


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            plain = value is None or isinstance(value, str | int | float)
            yield f"{prefix}{key}", value if plain else repr(value)[:MOST_VALUES] if not isinstance(value, list) else _listed(value)


def _listed(value: list[Any]) -> str:
    """A list on one line; what lies inside it deeper is cut, not walked."""
    return "[" + ", ".join("..." if isinstance(v, list | dict) else str(v) for v in value[:100]) + "]"


def _object(run: Run, name: str) -> dict[str, Any]:
    try:
        value = json.loads((run.folder / name).read_text("utf-8"))
        if isinstance(value, dict):
            return value
        run.notes.append(f"{name} holds no object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError):
        run.notes.append(f"{name} cannot be read")
    return {}


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; other lines are counted in a note, but for a last one that a crash cut short."""
    try:
        lines = (run.folder / name).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror}")
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
        run.notes.append(f"{name}: {bad} damaged lines left out")
    return found


def _metrics(run: Run) -> None:
    by_step = {r["step"]: r for r in _lines(run, "metrics.jsonl") if type(r.get("step")) is int and 0 <= r["step"] < 1 << 53}
    run.steps = np.array(sorted(by_step), np.int64)
    rows = [by_step[step] for step in run.steps.tolist()]
    for name in COLUMNS:
        values = [number(row.get(name)) for row in rows]
        run.columns[name] = np.array([math.nan if v is None else v for v in values], float)
    tokens, speed = run.columns["tokens"], run.columns["tokens_per_s"]
    spent = np.diff(tokens, prepend=0.0) / np.where(speed > 0, speed, math.nan)
    run.columns["seconds"] = np.cumsum(np.nan_to_num(spent, posinf=0.0, neginf=0.0))


def relative(folder: Path) -> str:
    """A folder as a person here would type it."""
    with contextlib.suppress(ValueError):
        return str(folder.resolve().relative_to(Path.cwd()))
    return os.fspath(folder)
