"""Hung and slow ranks, as found from heartbeats. Tables of pure cases."""

import random

import pytest

from cluster.device_health.device_fault import DeviceFault
from cluster.device_health.flight_record import StuckCollective
from cluster.supervision.hang_detector import (
    HangLimits,
    StragglerDetector,
    diagnose_hang,
    refine_diagnosis,
    summarise_steps,
)
from cluster.supervision.outcome import Heartbeat

LIMITS = HangLimits(hang_s=10, start_s=300)


def heartbeat(rank, phase="data", still_s=20.0, longest_s=0.1, **more):
    return Heartbeat(rank, more.pop("step", 5), phase, still_s=still_s, longest_s=longest_s, **more)


def waits(rank, count=7, **more):
    return heartbeat(rank, "data", collective="all_reduce_sum", count=count, inside=True, **more)


@pytest.mark.parametrize(
    ("heartbeats", "culprit"),
    [
        # asleep in data: the other is in the collective that it has not begun
        ([waits(0), heartbeat(1, count=6)], 1),
        ([waits(0), waits(1), waits(2, count=6), waits(3)], 2),
        # equally many collectives begun, and one has left it: it is busy elsewhere
        ([waits(0), heartbeat(1, "save", count=7)], 1),
        # a stopped process is to blame wherever it stands
        ([heartbeat(0, count=6), waits(1, state="T")], 1),
        ([waits(0, state="t"), waits(1)], 0),
        # in another collective than most: it has skipped one
        ([waits(0), waits(1), heartbeat(2, count=7, inside=True, collective="broadcast_object")], 2),
        ([waits(0), heartbeat(1, count=7, inside=True, collective="broadcast_object")], None),
        # several of them: the first is named
        ([waits(0), heartbeat(1, count=6), heartbeat(2, count=6)], 1),
        # nobody to blame: all inside the same collective, or none in any
        ([waits(0), waits(1)], None),
        ([heartbeat(0, count=7), heartbeat(1, count=7)], None),
        ([heartbeat(0, "end", longest_s=0.0, still_s=51)], 0),
    ],
)
def test_hang_blames_the_rank_that_the_others_wait_for(heartbeats, culprit):
    diagnosis = diagnose_hang(heartbeats, LIMITS)
    assert diagnosis is not None
    assert diagnosis.rank == culprit


@pytest.mark.parametrize(
    "heartbeats",
    [
        [],
        [heartbeat(0, still_s=9), heartbeat(1, still_s=20)],  # one of them moves
        [heartbeat(0, still_s=10), heartbeat(1, still_s=10)],  # not yet longer than the limit
        # phases that the rank has not been through may take longer, and a start as long as workers may take to meet
        [heartbeat(0, "eval", longest_s=0.0, still_s=49), waits(1)],
        [heartbeat(0, "start", longest_s=0.0, still_s=299), heartbeat(1, "start", longest_s=0.0, still_s=299)],
        # a save took 15 s before: 29 s are no wonder
        [heartbeat(0, "save", longest_s=15, still_s=29), waits(1, still_s=29)],
        [waits(0, state="T", still_s=9), waits(1, still_s=9)],
    ],
)
def test_ranks_within_their_limits_do_not_hang(heartbeats):
    assert diagnose_hang(heartbeats, LIMITS) is None


def test_stopped_process_is_diagnosed_while_others_move():
    diagnosis = diagnose_hang([heartbeat(0, still_s=0.1), heartbeat(1, "backward", state="T", still_s=11)], LIMITS)
    assert (diagnosis.rank, diagnosis.description) == (1, "hung: nothing moved for 11 s in backward of step 5")
    assert diagnosis.evidence == ("it is stopped by a signal (SIGSTOP, or a debugger)", "rank 0 is in data of step 5")


def test_diagnosis_says_where_the_others_wait():
    diagnosis = diagnose_hang([waits(0), waits(2), heartbeat(3, count=6), waits(1)], LIMITS)
    assert diagnosis.evidence == ("ranks 0, 1, 2 wait in all_reduce_sum #7",)
    unclear = diagnose_hang([waits(0), waits(1)], LIMITS)
    assert (
        unclear.description
        == "no rank has moved for 20 s, and none can be blamed: ranks 0, 1 wait in all_reduce_sum #7"
    )


def find_slow_ranks(works, steps, steps_per_heartbeat=10):
    """The slow ranks that a detector finds, with the step, where steps take ``works(rank, step)`` seconds."""
    detector, slow_ranks, busy, now = StragglerDetector(), [], [0.0] * 4, 0.0
    for step in range(steps):
        took = [works(rank, step) for rank in range(4)]
        busy = [b + t for b, t in zip(busy, took, strict=True)]
        now += max(took)
        if step % steps_per_heartbeat == 0:
            heartbeats = [Heartbeat(rank, step, "data", busy_s=busy[rank]) for rank in range(4)]
            slow_ranks += [(step, *slow) for slow in detector.find_slow(heartbeats, now)]
    return slow_ranks


def test_slow_rank_is_reported_once_with_its_ratio():
    slow_ranks = find_slow_ranks(lambda rank, step: 1.0 if rank != 2 else 1.4, steps=60, steps_per_heartbeat=1)
    assert len(slow_ranks) == 1
    step, rank, ratio = slow_ranks[0]
    assert (rank, round(ratio, 2)) == (2, 1.4)
    assert step <= 20


def test_step_seconds_of_the_ranks_are_summed_up_by_window():
    detector = StragglerDetector()
    for step in range(0, 21, 10):
        detector.find_slow([Heartbeat(rank, step, "data", busy_s=step * (1.0 + rank)) for rank in range(3)], 3.0 * step)
    assert detector.step_s == {0: 1.0, 1: 2.0, 2: 3.0}
    assert summarise_steps(detector.step_s) == {
        "rank_step_s_min": 1.0,
        "rank_step_s_median": 2.0,
        "rank_step_s_max": 3.0,
        "slowest_rank": 2,
    }


def test_noise_of_the_machine_reports_no_rank():
    draw = random.Random(3)
    assert find_slow_ranks(lambda rank, step: 0.1 * draw.uniform(0.7, 2.1), steps=10_000) == []
    assert find_slow_ranks(lambda rank, step: 0.001 * (1 + rank), steps=10_000) == [], "too little time to matter"
    assert find_slow_ranks(lambda rank, step: 5.0 if (rank, step % 97) == (1, 5) else 0.1, steps=10_000) == [], (
        "one long step is no habit"
    )


def test_rank_that_recovers_and_slows_again_is_reported_again():
    slow_ranks = find_slow_ranks(
        lambda rank, step: 1.5 if rank == 1 and step // 50 % 2 else 1.0, steps=200, steps_per_heartbeat=1
    )
    assert [rank for _, rank, _ in slow_ranks] == [1, 1]


STUCK = StuckCollective("rank 0 waits in nccl:all_reduce #42 of the default group, which rank 1 did not join", (1,))
XID = DeviceFault("Xid 79: the GPU has fallen off the bus", "host", proven=True)


@pytest.mark.parametrize(
    ("heartbeats", "stuck", "faults", "fault", "rank", "description"),
    [
        # nothing is known beside the heartbeats
        ([waits(0), heartbeat(1, count=6)], None, {}, "hung", 1, "hung: nothing moved for 20 s in data of step 5"),
        # on a GPU both wait for the device, outside of any collective: the collective tells
        ([heartbeat(0), heartbeat(1)], STUCK, {}, "hung", 1, "hung: nothing moved for 20 s in data of step 5"),
        # what the heartbeats say of a rank stays
        ([heartbeat(0, count=6), waits(1)], STUCK, {}, "hung", 0, "hung: nothing moved for 20 s in data of step 5"),
        # a device that reports a fault outweighs all
        (
            [waits(0), waits(1), waits(2, count=6)],
            STUCK,
            {0: XID},
            "device",
            0,
            "hung in data of step 5: its device has failed: Xid 79: the GPU has fallen off the bus",
        ),
    ],
)
def test_hang_is_refined_by_collectives_and_devices(heartbeats, stuck, faults, fault, rank, description):
    refined = refine_diagnosis(diagnose_hang(heartbeats, LIMITS), heartbeats, stuck, faults)
    assert (refined.fault, refined.rank, refined.description) == (fault, rank, description)
    assert refined.device == faults.get(rank)
    assert (STUCK.text in refined.evidence) is (stuck is not None)
