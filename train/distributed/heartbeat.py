"""Heartbeat of a rank: its step, phase and current collective, in shared memory.

Its agent reads the memory even while the rank hangs.
Each phase is marked (``train.reporting.activity`` and the engine) and each collective counted. A mark is a few stores
into memory, about a microsecond, without any communication. Until ``attach`` gives a file, the memory is private to the
process, which has one heartbeat.
"""

from __future__ import annotations

import functools
import mmap
import struct
import time
from collections.abc import Callable
from typing import Any, TypeVar

PHASES = ("start", "data", "forward", "backward", "step", "save", "eval", "sample", "end")
"""Phases of a rank; ``start`` is all before its first step, ``end`` all after its last, "step" the optimizer's update.
"""
STEP_PHASES = ("data", "forward", "backward", "step")
"""The phases of a training step: their time without waiting shows which rank is a straggler."""

_FIELDS = ("step", "phase", "micro", "count", "inside")
_TIMES = ("changed", "busy", *(f"longest_{phase}" for phase in PHASES))
_NAME_AT, _NAME_BYTES = 8 * (len(_FIELDS) + len(_TIMES)), 32
SIZE = mmap.PAGESIZE
"""Bytes of the shared memory: one page."""
_LAYOUT = struct.Struct(f"={len(_FIELDS)}q{len(_TIMES)}d{_NAME_BYTES}s")

F = TypeVar("F", bound=Callable[..., Any])


class HeartbeatWriter:
    """Writes this process's heartbeat. Times are seconds of the host's monotonic clock, which its processes share."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._map(memory)
        self._phase, self._since, self._waited, self._busy = 0, time.monotonic(), 0.0, 0.0
        self._listener: Callable[[str, int], None] | None = None
        self._times[0] = self._since

    def _map(self, memory: mmap.mmap) -> None:
        self._memory, view = memory, memoryview(memory)
        end = 8 * len(_FIELDS)
        self._numbers, self._times = view[:end].cast("q"), view[end:_NAME_AT].cast("d")

    def attach(self, fd: int) -> None:
        """Move the heartbeat into the open file ``fd``, of ``SIZE`` bytes, which another process maps too."""
        memory = mmap.mmap(fd, SIZE)
        memory[:] = self._memory[:]
        self._map(memory)
        self._since = self._times[0] = time.monotonic()

    def enter_phase(self, phase: str, micro: int = 0) -> None:
        """End the last phase and begin ``phase``; ``micro`` is the micro-batch, from 0."""
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
        if self._listener:
            self._listener(phase, micro)

    def on_phase(self, listener: Callable[[str, int], None] | None) -> None:
        """Have ``listener(phase, micro)`` called as each phase begins; None: no more."""
        self._listener = listener

    def set_step(self, number: int) -> None:
        """Set the optimizer step that is being made, from 1."""
        self._numbers[0] = number

    def touch(self) -> None:
        """Show that a long phase makes progress."""
        self._times[0] = time.monotonic()

    def count_calls(self, collective: F, called: str = "") -> F:
        """Wrap a collective so that each call is marked: its name, the number of calls so far, and that the rank is
        inside it.
        """
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
    """Decode a heartbeat's memory, with the field names of ``cluster.supervision.outcome.Heartbeat``.

    A worker that writes where it must not may have overwritten it: whatever it holds, something is returned.
    """
    values = _LAYOUT.unpack(memory[: _LAYOUT.size])
    fields: dict[str, Any] = dict(zip((*_FIELDS, *_TIMES), values[:-1], strict=True))
    phase = dict(enumerate(PHASES)).get(fields["phase"], PHASES[0])
    return {
        "step": fields["step"],
        "phase": phase,
        "micro": fields["micro"],
        "collective": values[-1].rstrip(b"\0").decode("utf-8", "replace"),
        "count": fields["count"],
        "inside": bool(fields["inside"]),
        "still_s": time.monotonic() - fields["changed"],
        "longest_s": fields[f"longest_{phase}"],
        "busy_s": fields["busy"],
    }


_writer = HeartbeatWriter(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
attach, enter_phase, on_phase, set_step, touch, count_calls = (
    _writer.attach,
    _writer.enter_phase,
    _writer.on_phase,
    _writer.set_step,
    _writer.touch,
    _writer.count_calls,
)
