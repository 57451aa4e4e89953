"""The phases of an attempt and the transitions between them, as one pure function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from cluster.supervision.timeouts import KILL_REPORT_S, SETTLE_S, TEARDOWN_S


class Phase(Enum):
    """How far an attempt has come on its way to an end."""

    RUNNING = "running"
    """Every rank that has ended has ended well."""
    SETTLING = "settling"
    """A rank has failed, maybe because of another: the others may still say why."""
    KILLED = "killed"
    """The ranks that were left have been killed."""


class Action(Enum):
    """Steps that the driver takes towards an attempt's next state."""

    STOP_RANKS = "stop ranks"
    """Signal the living ranks to save and end."""
    KILL_RANKS = "kill ranks"
    GIVE_UP_LATE = "give up late"
    """Count killed ranks as lost whose exits are not reported in time, see ``judge_ending``."""


class Ending(Enum):
    """How far a killed rank has come, while its exit is not reported."""

    UNDER_WAY = "under way"
    SILENT = "silent"
    """Its agent does not answer: the network or the host is lost."""
    STUCK = "stuck"
    """Its agent answers, and its process does not end."""


@dataclass(frozen=True)
class AttemptState:
    """An attempt's phase, and whether it is being stopped."""

    phase: Phase = Phase.RUNNING
    since: float = 0.0
    """When the phase began (monotonic)."""
    stopping: bool = False
    """The driver has told all ranks to save and end. They may fail on the way, so it is no phase."""


@dataclass(frozen=True)
class AttemptFacts:
    """The facts that decide on an attempt's next state."""

    now: float
    """Monotonic seconds."""
    stop_requested: bool = False
    """The job was asked to stop."""
    failed: bool = False
    """A rank has failed."""
    cause_known: bool = False
    """The failure is not another's consequence, so no rank need be waited for."""
    stuck: bool = False
    """The living ranks cannot go on."""
    should_grow: bool = False
    """A larger attempt is ready, and nothing would be lost by ending this one."""


def next_state(state: AttemptState, facts: AttemptFacts) -> tuple[AttemptState, list[Action]]:
    """The state that follows, and the actions that lead to it, in order."""
    actions = []
    if not state.stopping and (facts.stop_requested or (facts.should_grow and state.phase is Phase.RUNNING)):
        state = replace(state, stopping=True)
        actions.append(Action.STOP_RANKS)
    if state.phase is Phase.KILLED:
        return state, [*actions, Action.GIVE_UP_LATE]
    if facts.failed and state.phase is Phase.RUNNING:
        state = replace(state, phase=Phase.SETTLING, since=facts.now)
    settled = state.phase is Phase.SETTLING and (facts.cause_known or facts.now > state.since + SETTLE_S)
    if settled or facts.stuck:
        state = replace(state, phase=Phase.KILLED, since=facts.now)
        actions.append(Action.KILL_RANKS)
    return state, actions


def judge_ending(now: float, killed: float, answered: float | None) -> Ending:
    """How far a rank is that was ``killed`` and has not ended, by when its agent last ``answered``.

    All are monotonic seconds. A process that frees a GPU takes long to end, and its agent answers meanwhile.
    """
    if now > max(killed, answered or killed) + KILL_REPORT_S:
        return Ending.SILENT
    return Ending.STUCK if now > killed + TEARDOWN_S else Ending.UNDER_WAY
