"""Whether and when a job starts again after failures. Tables of pure cases."""

import pytest

from cluster.device_health.device_fault import DeviceFault
from cluster.supervision.left_places import LeftPlace
from cluster.supervision.restart_policy import Failure, decide, in_a_row
from cluster.worker.messages import SlotInfo


def row_of(*failures):
    row = []
    for fault, signature, step, saved in failures:
        row = in_a_row(row, Failure(fault, signature, step, saved))
    return row


KILL = ("killed", "code -9", 12, 10)
RAISE = ("raised", "ValueError: the oar broke", 12, 10)


@pytest.mark.parametrize(
    ("failures", "allowed", "again", "wait", "words"),
    [
        ([KILL], 3, True, 0, "starting again from the checkpoint of step 10 (restart 1 of 3 without progress)"),
        ([("killed", "code -9", 3, 0)], 3, True, 0, "starting again from the beginning: there is no checkpoint yet"),
        ([KILL, KILL], 3, True, 1, "starting again in 1 s from"),
        ([KILL, KILL, KILL], 3, True, 2, "(restart 3 of 3"),
        ([KILL] * 4, 3, False, 0, "giving up: cluster.max_failures=3 restarts in a row made no progress"),
        ([KILL] * 9, 99, True, 60, "in 60 s"),
        ([KILL], 0, False, 0, "cluster.max_failures=0 allows no restart"),
        ([RAISE], 3, True, 0, "starting again"),
        # a failure of the run itself with the same signature at the same step will come again
        ([RAISE, RAISE], 3, False, 0, "failed twice in the same way at the same step"),
        ([RAISE, KILL], 3, True, 1, "starting again"),
        ([RAISE, ("raised", "ValueError: another", 12, 10)], 3, True, 1, "starting again"),
        ([("out of host memory", "code -9", 5, 0)] * 2, 3, False, 0, "failed twice"),
        ([("hung", "nothing moved", 5, 0)] * 2, 3, False, 0, "failed twice"),
        ([("network lost", "cut off", 5, 0)] * 2, 3, True, 1, "starting again"),
        # a fault of the device is left behind, so it may come twice: on another
        ([("device", "uncorrectable ECC error", 5, 0)] * 2, 3, True, 1, "starting again"),
        # progress resets the count: a later step, or a newer checkpoint
        ([KILL, KILL, KILL, ("killed", "code -9", 13, 10)], 3, True, 0, "restart 1 of 3"),
        ([RAISE, ("raised", RAISE[1], 12, 11)], 3, True, 0, "from the checkpoint of step 11 (restart 1 of 3"),
    ],
)
def test_decision_by_row_of_failures(failures, allowed, again, wait, words):
    decision = decide(row_of(*failures), allowed)
    assert (decision.again, decision.wait_s) == (again, wait)
    assert words in decision.message


GPU_3 = LeftPlace.of(
    SlotInfo("n7", "oar7", "10.0.0.7", 4242, ("3",)), DeviceFault("uncorrectable ECC error encountered")
)


def test_decision_after_device_fault_names_the_place_or_the_shortage():
    failures = row_of(("device", "ECC", 12, 10))
    assert decide(failures, 3, GPU_3).message == (
        "starting again without GPU 3 of oar7 from the checkpoint of step 10 (restart 1 of 3 without progress)"
    )
    assert not decide(failures, 3, GPU_3, "giving up: without").again
