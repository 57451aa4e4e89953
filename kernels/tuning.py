"""Which tiles a kernel runs with: measured once a GPU and version for each class of shapes, and kept on disk.

Training never measures in passing. ``measuring()`` is entered on purpose, by one process of a host, before its first step or by
the benchmark; every other call takes what the table holds, or an op's own first guess.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton

Tiles = dict[str, int]
"""Constants of a kernel (block sizes) and of its launch (num_warps, num_stages)."""

ROUNDS, WARM_UP = 11, 3
_forced: dict[str, Tiles] = {}
_measuring = False
_every_candidate = False


def best(op: str, shape_class: Sequence[object], candidates: Sequence[Tiles], run: Callable[[Tiles], object]) -> Tiles:
    """The tiles for ``op`` on this class of shapes: the first candidate is the guess where nothing was measured.

    ``run`` starts the kernel with given tiles; it may be called many times, so it must write nothing but its outputs.
    """
    if op in _forced:
        return _forced[op]
    if _every_candidate:
        for tiles in candidates:
            run(tiles)
    if len(candidates) == 1:
        return candidates[0]
    table, key = _table(_file()), f"{op} {' '.join(map(str, shape_class))}"
    if key not in table and _measuring:
        table[key] = min(candidates, key=functools.partial(_milliseconds, run))
        _keep(_file(), key, table[key])
    return table.get(key, candidates[0])


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Within, classes of shapes that the table lacks are measured, candidate by candidate, and added to it."""
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


@contextlib.contextmanager
def force(**tiles: Tiles) -> Iterator[None]:
    """Within, the ops named run with the tiles given: how tests reach every candidate."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def every_candidate() -> Iterator[None]:
    """Within, every candidate is started before the choice is: how a test compiles all that may ever run."""
    global _every_candidate
    _every_candidate = True
    try:
        yield
    finally:
        _every_candidate = False


def forget() -> None:
    """Drops what was read from the disk: the next look reads it again."""
    _file.cache_clear()
    _table.cache_clear()


def _milliseconds(run: Callable[[Tiles], object], tiles: Tiles) -> float:
    """Median time of a run; infinite for tiles that this device has no room for."""
    try:
        times = (_on_cuda if torch.cuda.is_available() else _on_cpu)(functools.partial(run, tiles))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    return statistics.median(times[WARM_UP:])


def _on_cuda(run: Callable[[], object]) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WARM_UP + ROUNDS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _on_cpu(run: Callable[[], object]) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(WARM_UP + ROUNDS):
        run()
        marks.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]


@functools.cache
def _file() -> Path:
    """The table of this device, these versions and this text of the kernels."""
    sources = b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.rglob("*.py")))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    about = [device, f"torch{torch.__version__}", f"triton{triton.__version__}"]
    name = "-".join([*about, hashlib.sha256(sources).hexdigest()[:12]]).replace(" ", "_").replace("/", "_")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trireme" / "tiles" / f"{name}.json"


@functools.cache
def _table(file: Path) -> dict[str, Tiles]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _keep(file: Path, key: str, tiles: Tiles) -> None:
    """Adds a line to the table on disk, beside what other processes have added; without room it is only remembered."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _table.cache_clear()
            table = _table(file)
            table[key] = tiles
            aside = file.with_suffix(".new")
            aside.write_text(json.dumps(table, indent=0, sort_keys=True))
            aside.replace(file)
