"""The transitions of an attempt from one phase to the next, and the actions on the way. Tables of pure cases."""

import pytest

from cluster.supervision.attempt_state import (
    Action,
    AttemptFacts,
    AttemptState,
    Ending,
    Phase,
    judge_ending,
    next_state,
)
from cluster.supervision.timeouts import KILL_REPORT_S, POLL_S, SETTLE_S, TEARDOWN_S, TICK_S

RUNNING = AttemptState()
STOPPING = AttemptState(stopping=True)
SETTLING = AttemptState(Phase.SETTLING, since=100.0)
KILLED = AttemptState(Phase.KILLED, since=100.0)
SOON, LATE = 100.0 + SETTLE_S / 2, 100.0 + 2 * SETTLE_S
STOP, KILL, GIVE_UP = Action.STOP_RANKS, Action.KILL_RANKS, Action.GIVE_UP_LATE


@pytest.mark.parametrize(
    ("state", "seen", "phase", "stopping", "actions"),
    [
        (RUNNING, {}, Phase.RUNNING, False, []),
        # a request to stop is passed on once, whatever the phase
        (RUNNING, {"stop_requested": True}, Phase.RUNNING, True, [STOP]),
        (STOPPING, {"stop_requested": True}, Phase.RUNNING, True, []),
        (SETTLING, {"stop_requested": True, "failed": True}, Phase.SETTLING, True, [STOP]),
        (KILLED, {"stop_requested": True}, Phase.KILLED, True, [STOP, GIVE_UP]),
        # to grow, the ranks stop as on request; not while they stop already, nor after a failure
        (RUNNING, {"should_grow": True}, Phase.RUNNING, True, [STOP]),
        (STOPPING, {"should_grow": True}, Phase.RUNNING, True, []),
        # a failure that may be a consequence settles first
        (RUNNING, {"failed": True}, Phase.SETTLING, False, []),
        (STOPPING, {"failed": True}, Phase.SETTLING, True, []),
        (SETTLING, {"failed": True}, Phase.SETTLING, False, []),
        (SETTLING, {"failed": True, "now": LATE}, Phase.KILLED, False, [KILL]),
        (SETTLING, {"failed": True, "cause_known": True}, Phase.KILLED, False, [KILL]),
        (RUNNING, {"failed": True, "cause_known": True}, Phase.KILLED, False, [KILL]),
        # ranks that cannot go on are killed at once
        (RUNNING, {"stuck": True}, Phase.KILLED, False, [KILL]),
        (STOPPING, {"stuck": True}, Phase.KILLED, True, [KILL]),
        # they are killed once, and then given up where their agents are silent
        (KILLED, {}, Phase.KILLED, False, [GIVE_UP]),
        (KILLED, {"failed": True, "cause_known": True, "now": LATE}, Phase.KILLED, False, [GIVE_UP]),
    ],
)
def test_next_state_by_phase_and_observation(state, seen, phase, stopping, actions):
    after, done = next_state(state, AttemptFacts(**{"now": SOON, **seen}))
    assert (after.phase, after.stopping, done) == (phase, stopping, actions)
    assert after.since == (state.since if phase is state.phase else seen.get("now", SOON))


@pytest.mark.parametrize(
    ("now", "answered", "ending"),
    [
        (0.1, None, Ending.UNDER_WAY),
        (KILL_REPORT_S - 0.1, -20.0, Ending.UNDER_WAY),
        # nothing is heard of its agent since before the kill, or since some time after it
        (KILL_REPORT_S + 0.1, None, Ending.SILENT),
        (KILL_REPORT_S + 0.1, -20.0, Ending.SILENT),
        (20.0, 20.0 - KILL_REPORT_S - 0.1, Ending.SILENT),
        # its agent answers: a GPU takes as long as it takes, up to a minute
        (KILL_REPORT_S + 0.1, KILL_REPORT_S - POLL_S, Ending.UNDER_WAY),
        (20.0, 20.0 - POLL_S - 2 * TICK_S, Ending.UNDER_WAY),
        (TEARDOWN_S - 0.1, TEARDOWN_S - 1, Ending.UNDER_WAY),
        (TEARDOWN_S + 0.1, TEARDOWN_S - 1, Ending.STUCK),
        # the minute is over, and the agent has gone silent in it
        (TEARDOWN_S + 0.1, TEARDOWN_S - 2 * KILL_REPORT_S, Ending.SILENT),
    ],
)
def test_killed_rank_is_silent_or_stuck_by_its_agents_last_answer(now, answered, ending):
    killed = 1000.0
    assert judge_ending(killed + now, killed, answered and killed + answered) is ending
