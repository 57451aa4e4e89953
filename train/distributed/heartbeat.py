"""The pulse of a rank: what it is doing, in a small shared memory that others may look at while it works, hangs or is stopped.

The loop marks each phase with a line, and each collective is counted; a mark is a few stores into memory, about a microsecond, and
talks to nobody. Until ``share`` gives a file, the record is private to the process. One process has one pulse.
"""

from __future__ import annotations

import functools
import mmap
import struct
import time
from collections.abc import Callable
from typing import Any, TypeVar

PHASES = ("start", "data", "forward", "backward", "step", "save", "eval", "sample", "end")
"""What a rank does; ``start`` is all before its first step, ``end`` all after its last. "step" is the optimizer's."""
STEP_PHASES = ("data", "forward", "backward", "step")
"""The phases that make a training step: a rank that takes longer in them than others holds them up."""

_FIELDS = ("step", "phase", "micro", "count", "inside")
_TIMES = ("changed", "busy", *(f"longest_{phase}" for phase in PHASES))
_NAME_AT, _NAME_BYTES = 8 * (len(_FIELDS) + len(_TIMES)), 32
SIZE = mmap.PAGESIZE
"""Bytes of the record."""
_LAYOUT = struct.Struct(f"={len(_FIELDS)}q{len(_TIMES)}d{_NAME_BYTES}s")

F = TypeVar("F", bound=Callable[..., Any])


class HeartbeatWriter:
    """The writer's side. All times are seconds of the host's monotonic clock, which its processes share."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._map(memory)
        self._phase, self._since, self._waited, self._busy = 0, time.monotonic(), 0.0, 0.0
        self._times[0] = self._since

    def _map(self, memory: mmap.mmap) -> None:
        self._memory, view = memory, memoryview(memory)
        end = 8 * len(_FIELDS)
        self._numbers, self._times = view[:end].cast("q"), view[end:_NAME_AT].cast("d")

    def attach(self, fd: int) -> None:
        """From here on the record is in the open file ``fd``, of ``SIZE`` bytes."""
        memory = mmap.mmap(fd, SIZE)
        memory[:] = self._memory[:]
        self._map(memory)
        self._since = self._times[0] = time.monotonic()

    def enter_phase(self, phase: str, micro: int = 0) -> None:
        """A phase begins, and the last one ends. ``micro`` is the micro-batch, from 0."""
        now = time.monotonic()
        took, numbers, times = now - self._since, self._numbers, self._times
        if 1 <= self._phase <= len(STEP_PHASES):
            self._busy += took - self._waited
            times[1] = self._busy
        at = 2 + self._phase
        if took > times[at]:
            times[at] = took
        self._phase, self._since, self._waited = PHASES.index(phase), now, 0.0
        numbers[1], numbers[2] = self._phase, micro
        times[0] = now

    def set_step(self, number: int) -> None:
        """The optimizer step that is being made, from 1."""
        self._numbers[0] = number

    def touch(self) -> None:
        """Something moved within a long phase."""
        self._times[0] = time.monotonic()

    def count_calls(self, collective: F, called: str = "") -> F:
        """The function, with each call marked: what it is ``called``, how many there were, and that the rank is inside it."""
        name = (called or collective.__name__).encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")

        @functools.wraps(collective)
        def marked(*args: Any, **options: Any) -> Any:
            numbers, began = self._numbers, time.monotonic()
            self._memory[_NAME_AT : _NAME_AT + _NAME_BYTES] = name
            numbers[3] += 1
            numbers[4] = 1
            self._times[0] = began
            try:
                return collective(*args, **options)
            finally:
                numbers[4] = 0
                now = self._times[0] = time.monotonic()
                self._waited += now - began

        return marked  # type: ignore[return-value]


def read(memory: bytes | mmap.mmap) -> dict[str, Any]:
    """What a record says now, for people and machines: see ``cluster.supervision.hang_detector.Beat``, which has the same names."""
    values = _LAYOUT.unpack(memory[: _LAYOUT.size])
    found: dict[str, Any] = dict(zip((*_FIELDS, *_TIMES), values[:-1], strict=True))
    phase = PHASES[found["phase"]]
    return {
        "step": found["step"],
        "phase": phase,
        "micro": found["micro"],
        "collective": values[-1].rstrip(b"\0").decode(),
        "count": found["count"],
        "inside": bool(found["inside"]),
        "still_s": time.monotonic() - found["changed"],
        "longest_s": found[f"longest_{phase}"],
        "busy_s": found["busy"],
    }


_writer = HeartbeatWriter(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
attach, enter_phase, set_step, touch, count_calls = (
    _writer.attach,
    _writer.enter_phase,
    _writer.set_step,
    _writer.touch,
    _writer.count_calls,
)
