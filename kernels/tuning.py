"""Autotuning of tile sizes and attention backends: measured once per GPU, version and class of shapes, kept on disk.

Training never measures implicitly: one process per host, or the benchmark, enters ``measuring_tiles()`` before its
first step. Every other call uses the stored table, or an op's first candidate.

The choices decide the order of sums, so a run keeps its own: ``used_choices`` are those of this process so far, and
after ``fix_choices`` it makes no others.
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
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

Tiles = dict[str, int]
"""Constexprs of a kernel (block sizes) and options of its launch (num_warps, num_stages)."""
Candidate = TypeVar("Candidate", Tiles, str)
"""Tiles of a kernel, or the name of an implementation."""
Choices = dict[str, Any]
"""The tiles, or the name, that was chosen for an op and a class of shapes, under "<op> <class>"."""

ROUNDS, WARM_UP_ROUNDS = 11, 3


class CannotRun(Exception):  # noqa: N818  the other candidates can
    """Raised by the run of a candidate that this device, or this build of a library, has no kernel for."""


_forced: Choices = {}
_used: Choices = {}
_fixed: Choices | None = None
_measuring = False
_run_every_candidate = False


def best_tiles(
    op: str, shape_class: Sequence[object], candidates: Sequence[Candidate], run: Callable[[Candidate], object]
) -> Candidate:
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
    key = f"{op} {' '.join(map(str, shape_class))}"
    _used[key] = _choose(key, candidates, run)
    return _used[key]


def _choose(key: str, candidates: Sequence[Candidate], run: Callable[[Candidate], object]) -> Candidate:
    if key in (_fixed or {}):
        return _fixed[key]  # type: ignore[index]
    if _fixed is not None and not _measuring:
        return candidates[0]
    table = _read_table(_table_path())
    if key not in table and _measuring:
        table[key] = min(candidates, key=functools.partial(_median_ms, run))
        _store(_table_path(), key, table[key])
    return table[key] if table.get(key) in candidates else candidates[0]  # the file may be anything


def used_choices() -> Choices:
    """All choices that this process has made, where there was more than one candidate: JSON-able."""
    return dict(_used)


def fix_choices(choices: Choices) -> None:
    """From now on these hold in this process; a class of shapes they lack gets its first candidate, or is measured.

    What other runs have measured on this machine is then read only to spare a measurement.
    """
    global _fixed
    _fixed = dict(choices)


def identity() -> dict[str, str]:
    """All that a choice depends on beside the shapes: GPU, versions, and the source text of the kernels."""
    sources = b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.rglob("*.py")))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    about = {"device": device, "torch": str(torch.__version__), "sources": hashlib.sha256(sources).hexdigest()[:12]}
    with contextlib.suppress(metadata.PackageNotFoundError):
        about["triton"] = metadata.version("triton")
    return about


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
def force_tiles(**tiles: Tiles | str) -> Iterator[None]:
    """Context in which the named ops run with the given tiles, or as named; tests reach every candidate this way."""
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
    """Forgets all choices of this process and the table read from disk, so that the next call reads it again."""
    global _fixed
    _fixed = None
    _used.clear()
    _table_path.cache_clear()
    _read_table.cache_clear()


def _median_ms(run: Callable[[Candidate], object], candidate: Candidate) -> float:
    """Median time of a run in milliseconds; infinite for tiles that exceed this device's shared memory or registers."""
    from triton.runtime.errors import OutOfResources  # imported late: this module also loads where Triton is not

    try:
        times = (_times_on_cuda if torch.cuda.is_available() else _times_on_cpu)(functools.partial(run, candidate))
    except (OutOfResources, CannotRun):
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
    """Path of the table of this ``identity``: beside the kernels that Triton compiled, where that has a folder set."""
    folder, cache_dir = os.environ.get("TRITON_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(folder) / "trireme-tiles" if folder else Path(cache_dir) / "trireme" / "tiles"
    return path / ("-".join(identity().values()).replace(" ", "_").replace("/", "_") + ".json")


@functools.cache
def _read_table(file: Path) -> Choices:
    """The stored table; empty where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        table = json.loads(file.read_bytes())
        return table if isinstance(table, dict) else {}
    return {}


def _store(file: Path, key: str, choice: Tiles | str) -> None:
    """Adds an entry to the table on disk, keeping those of other processes; a failing disk is ignored."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _read_table.cache_clear()
            table = _read_table(file)
            table[key] = choice
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps(table, indent=0, sort_keys=True), encoding="utf-8")
            temporary.replace(file)
