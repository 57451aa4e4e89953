"""Phase of a rank: its heartbeat, ``phase`` events and the cause of its seconds, marked together.

Three readers follow a rank: the driver's hang detector (heartbeat), people and restart records (events), and the
goodput of the summary (seconds by cause). PHASES says what each phase of a run means to each of them, so that no caller
marks them by hand. Within a training step the engine marks the heartbeat alone: forward, backward and the optimizer's
step are too short for the other two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from train.distributed import heartbeat
from train.events import Emit, PhaseEvent
from train.reporting.goodput import TimeByCause


class PhaseMarks(NamedTuple):
    """The names of a phase of a run for its three readers; None: that reader does not distinguish it from the phase
    before.
    """

    heartbeat: str | None = None
    event: str | None = None
    cause: str | None = None


PHASES = {
    "open corpus": PhaseMarks(event="data"),
    "build engine": PhaseMarks(event="engine"),
    "first step": PhaseMarks(event="first_step"),
    "load batch": PhaseMarks(heartbeat="data", cause="data"),
    "train": PhaseMarks(event="train"),
    "evaluate": PhaseMarks(heartbeat="eval", event="eval", cause="eval"),
    "sample": PhaseMarks(heartbeat="sample"),
    "begin save": PhaseMarks(heartbeat="save", cause="save"),
    "wait for save": PhaseMarks(heartbeat="save", event="save"),
    "write profile": PhaseMarks(heartbeat="save", cause="other"),
    "end": PhaseMarks(heartbeat="end"),
}


class RankActivity:
    """Marks the phases of one rank's run."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.times = emit, TimeByCause()

    def begin_step(self, number: int) -> None:
        """The optimizer step ``number``, from 1, is being made."""
        heartbeat.set_step(number)

    def enter(self, phase: str) -> None:
        """``phase`` begins and lasts until another does."""
        marks = PHASES[phase]
        if marks.heartbeat:
            heartbeat.enter_phase(marks.heartbeat)
        if marks.event:
            self.emit(PhaseEvent.now(marks.event))

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Inside, the rank is in ``phase``; then it trains again, and the seconds since the last charge go to the
        phase's cause.

        Where an exception leaves it, nothing is marked: the run is ending, and its seconds go to what ends it.
        """
        marks = PHASES[phase]
        self.enter(phase)
        yield
        if marks.event:
            self.enter("train")
        if marks.cause:
            self.charge(marks.cause)

    def charge(self, cause: str, **within: float) -> float:
        """Give the seconds since the last charge to ``cause``, but for those of others ``within`` them: see
        ``TimeByCause.lap``.
        """
        return self.times.lap(cause, **within)
