"""Autotuning of tile sizes: measured once per GPU, version and class of shapes, and kept on disk.

Training never measures implicitly: one process per host, or the benchmark, enters ``measuring_tiles()`` before its
first step. Every other call uses the stored table, or an op's first candidate.
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
"""Constexprs of a kernel (block sizes) and options of its launch (num_warps, num_stages)."""

ROUNDS, WARM_UP_ROUNDS = 11, 3
_forced: dict[str, Tiles] = {}
_measuring = False
_run_every_candidate = False


def best_tiles(
    op: str, shape_class: Sequence[object], candidates: Sequence[Tiles], run: Callable[[Tiles], object]
) -> Tiles:
    """The fastest tiles of ``op`` for this class of shapes, or the first of ``candidates`` where nothing was measured.

    ``run`` starts the kernel with given tiles. It may be called many times, so it must write nothing but its outputs.
    """
    if op in _forced:
        return _forced[op]
    if _run_every_candidate:
        for tiles in candidates:
            run(tiles)
    if len(candidates) == 1:
        return candidates[0]
    table, key = _read_table(_table_path()), f"{op} {' '.join(map(str, shape_class))}"
    if key not in table and _measuring:
        table[key] = min(candidates, key=functools.partial(_median_ms, run))
        _store(_table_path(), key, table[key])
    return table.get(key, candidates[0])


@contextlib.contextmanager
def measuring_tiles() -> Iterator[None]:
    """Context in which all candidates are timed for shape classes that the table lacks, and the fastest is stored."""
    global _measuring
    previous, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = previous


@contextlib.contextmanager
def force_tiles(**tiles: Tiles) -> Iterator[None]:
    """Context in which the named ops run with the given tiles; tests reach every candidate this way."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def compiling_every_candidate() -> Iterator[None]:
    """Context in which every candidate runs before the chosen one; a test compiles all of them this way."""
    global _run_every_candidate
    _run_every_candidate = True
    try:
        yield
    finally:
        _run_every_candidate = False


def clear_cache() -> None:
    """Forgets the table read from disk, so that the next call reads it again."""
    _table_path.cache_clear()
    _read_table.cache_clear()


def _median_ms(run: Callable[[Tiles], object], tiles: Tiles) -> float:
    """Median time of a run in milliseconds; infinite for tiles that exceed this device's shared memory or registers."""
    try:
        times = (_times_on_cuda if torch.cuda.is_available() else _times_on_cpu)(functools.partial(run, tiles))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    return statistics.median(times[WARM_UP_ROUNDS:])


def _times_on_cuda(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each round, warm-up included, between two events on the CUDA stream."""
    events = []
    for _ in range(WARM_UP_ROUNDS + ROUNDS):
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _times_on_cpu(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each round, warm-up included, by the wall clock."""
    times = [time.perf_counter()]
    for _ in range(WARM_UP_ROUNDS + ROUNDS):
        run()
        times.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in itertools.pairwise(times)]


@functools.cache
def _table_path() -> Path:
    """Path of the table for this device, these versions of torch and Triton, and this source text of the kernels."""
    sources = b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.rglob("*.py")))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    identity = [device, f"torch{torch.__version__}", f"triton{triton.__version__}"]
    name = "-".join([*identity, hashlib.sha256(sources).hexdigest()[:12]]).replace(" ", "_").replace("/", "_")
    cache_dir = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_dir) / "trireme" / "tiles" / f"{name}.json"


@functools.cache
def _read_table(file: Path) -> dict[str, Tiles]:
    """The stored table, key -> tiles; empty where it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _store(file: Path, key: str, tiles: Tiles) -> None:
    """Adds an entry to the table on disk, keeping those of other processes; a failing disk is ignored."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _read_table.cache_clear()
            table = _read_table(file)
            table[key] = tiles
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps(table, indent=0, sort_keys=True))
            temporary.replace(file)
