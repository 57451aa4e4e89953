"""From the pulses of running ranks to who hangs and who is slow. Tables of pure cases."""

import random

import pytest

from cluster.supervision.hang_detector import HangLimits, StragglerDetector, diagnose_hang
from cluster.supervision.outcome import Heartbeat

LIMITS = HangLimits(hang_s=10, start_s=300)


def beat(rank, phase="data", still_s=20.0, longest_s=0.1, **more):
    return Heartbeat(rank, more.pop("step", 5), phase, still_s=still_s, longest_s=longest_s, **more)


def waits(rank, count=7, **more):
    return beat(rank, "data", collective="all_reduce_sum", count=count, inside=True, **more)


@pytest.mark.parametrize(
    ("beats", "culprit"),
    [
        # asleep in data: the other is in the collective that it has not begun
        ([waits(0), beat(1, count=6)], 1),
        ([waits(0), waits(1), waits(2, count=6), waits(3)], 2),
        # equally many collectives begun, and one has left it: it is busy elsewhere
        ([waits(0), beat(1, "save", count=7)], 1),
        # a stopped process is to blame wherever it stands
        ([beat(0, count=6), waits(1, state="T")], 1),
        ([waits(0, state="t"), waits(1)], 0),
        # in another collective than most: it has skipped one
        ([waits(0), waits(1), beat(2, count=7, inside=True, collective="broadcast_object")], 2),
        ([waits(0), beat(1, count=7, inside=True, collective="broadcast_object")], None),
        # several of them: the first is named
        ([waits(0), beat(1, count=6), beat(2, count=6)], 1),
        # nobody to blame: all inside the same collective, or none in any
        ([waits(0), waits(1)], None),
        ([beat(0, count=7), beat(1, count=7)], None),
        ([beat(0, "end", longest_s=0.0, still_s=51)], 0),
    ],
)
def test_the_rank_that_the_others_wait_for_is_to_blame(beats, culprit):
    found = diagnose_hang(beats, LIMITS)
    assert found is not None
    assert found.rank == culprit


@pytest.mark.parametrize(
    "beats",
    [
        [],
        [beat(0, still_s=9), beat(1, still_s=20)],  # one of them moves
        [beat(0, still_s=10), beat(1, still_s=10)],  # not yet longer than the limit
        # phases that the rank has not been through may take longer, and a start as long as workers may take to meet
        [beat(0, "eval", longest_s=0.0, still_s=49), waits(1)],
        [beat(0, "start", longest_s=0.0, still_s=299), beat(1, "start", longest_s=0.0, still_s=299)],
        # a save took 15 s before: 29 s are no wonder
        [beat(0, "save", longest_s=15, still_s=29), waits(1, still_s=29)],
        [waits(0, state="T", still_s=9), waits(1, still_s=9)],
    ],
)
def test_who_may_still_take_his_time_does_not_hang(beats):
    assert diagnose_hang(beats, LIMITS) is None


def test_a_stopped_process_is_found_even_while_others_move():
    found = diagnose_hang([beat(0, still_s=0.1), beat(1, "backward", state="T", still_s=11)], LIMITS)
    assert (found.rank, found.description) == (1, "hung: nothing moved for 11 s in backward of step 5")
    assert found.evidence == ("it is stopped by a signal (SIGSTOP, or a debugger)", "rank 0 is in data of step 5")


def test_the_words_say_where_the_others_wait():
    found = diagnose_hang([waits(0), waits(2), beat(3, count=6), waits(1)], LIMITS)
    assert found.evidence == ("ranks 0, 1, 2 wait in all_reduce_sum #7",)
    unclear = diagnose_hang([waits(0), waits(1)], LIMITS)
    assert (
        unclear.description
        == "no rank has moved for 20 s, and none can be blamed: ranks 0, 1 wait in all_reduce_sum #7"
    )


def play(works, steps, start=0.0, finder=None, per_beat=10):
    """The slow ranks that a detector finds, with the step, where steps take ``works(rank, step)`` seconds."""
    finder, found, busy, now = finder or StragglerDetector(), [], [0.0] * 4, start
    for step in range(steps):
        took = [works(rank, step) for rank in range(4)]
        busy = [b + t for b, t in zip(busy, took, strict=True)]
        now += max(took)
        if step % per_beat == 0:
            beats = [Heartbeat(rank, step, "data", busy_s=busy[rank]) for rank in range(4)]
            found += [(step, *slow) for slow in finder.find_slow(beats, now)]
    return found


def test_a_rank_that_works_longer_than_the_others_is_named_once_with_its_ratio():
    found = play(lambda rank, step: 1.0 if rank != 2 else 1.4, steps=60, per_beat=1)
    assert len(found) == 1
    step, rank, ratio = found[0]
    assert (rank, round(ratio, 2)) == (2, 1.4)
    assert step <= 20


def test_unrest_of_the_machine_names_nobody():
    draw = random.Random(3)
    assert play(lambda rank, step: 0.1 * draw.uniform(0.7, 2.1), steps=10_000) == []
    assert play(lambda rank, step: 0.001 * (1 + rank), steps=10_000) == [], "too little time to matter"
    assert play(lambda rank, step: 5.0 if (rank, step % 97) == (1, 5) else 0.1, steps=10_000) == [], (
        "one long step is no habit"
    )


def test_who_recovers_and_falls_back_is_named_again():
    found = play(lambda rank, step: 1.5 if rank == 1 and step // 50 % 2 else 1.0, steps=200, per_beat=1)
    assert [rank for _, rank, _ in found] == [1, 1]
