"""Whether and when a job starts again after failures. Tables of pure cases."""

import pytest

from cluster.device_health.device_fault import DeviceFault
from cluster.raycluster.placement import Node, WorkerRequest
from cluster.supervision.restart_policy import (
    Failure,
    LeftPlace,
    decide,
    in_a_row,
    is_left,
    room_without,
    shortage_without,
)
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


def slot(node, *gpus, host="oar7"):
    return SlotInfo(node, host, "10.0.0.7", 4242, gpus)


ECC = DeviceFault("uncorrectable ECC error encountered")
BUS = DeviceFault("Xid 79: the GPU has fallen off the bus", "host")


@pytest.mark.parametrize(
    ("info", "fault", "words"),
    [
        (slot("n7", "3"), ECC, "GPU 3 of oar7"),
        (slot("n7", "3"), BUS, "host oar7"),
        (slot("n7"), ECC, "host oar7"),  # no GPU to tell apart
    ],
)
def test_place_that_is_left_by_scope_of_the_fault(info, fault, words):
    assert LeftPlace.of(info, fault).words == words


GPU_3, HOST_7 = LeftPlace.of(slot("n7", "3"), ECC), LeftPlace.of(slot("n7", "3"), BUS)


@pytest.mark.parametrize(
    ("left", "info", "covered"),
    [
        ([GPU_3], slot("n7", "3"), True),
        ([GPU_3], slot("n7", "4"), False),
        ([GPU_3], slot("n8", "3", host="oar8"), False),
        # Ray was restarted on the host: the GPU is the same
        ([GPU_3], slot("n9", "3"), True),
        ([HOST_7], slot("n7", "4"), True),
        ([HOST_7], slot("n7"), True),
        # the host itself joined again
        ([HOST_7], slot("n9", "4"), False),
        ([GPU_3, HOST_7], slot("n7", "0"), True),
        ([], slot("n7", "3"), False),
    ],
)
def test_slots_in_places_that_were_left(left, info, covered):
    assert is_left(left, info) is covered


def node(name, cpus, gpus):
    return Node(name, cpus, gpus, cpus, gpus)


CLUSTER = [node("n7", 16, 8), node("n8", 16, 8)]
ONE_GPU = WorkerRequest(workers=16, cpus=1, gpus=1)


@pytest.mark.parametrize(
    ("nodes", "request_", "left", "room"),
    [
        (CLUSTER, ONE_GPU, [], 16),
        (CLUSTER, ONE_GPU, [GPU_3], 15),
        (CLUSTER, ONE_GPU, [GPU_3, GPU_3], 15),
        (CLUSTER, ONE_GPU, [HOST_7], 8),
        (CLUSTER, ONE_GPU, [GPU_3, HOST_7], 8),
        ([node("n7", 1, 1)], ONE_GPU, [GPU_3], 0),
        # cores are the tighter limit: a spare GPU is there
        ([node("n7", 4, 8)], ONE_GPU, [GPU_3], 4),
        ([node("n7", 4, 0), node("n8", 2, 0)], WorkerRequest(4, 2, 0), [HOST_7], 1),
    ],
)
def test_room_beside_places_that_were_left(nodes, request_, left, room):
    assert room_without(nodes, request_, left) == room


def test_job_goes_on_while_there_is_room_and_says_what_to_do_when_not():
    assert shortage_without([GPU_3], 15, 15) == ""
    assert shortage_without([GPU_3], 15, 16) == (
        "giving up: without GPU 3 of oar7 (uncorrectable ECC error encountered) only 15 workers fit on the cluster, "
        "and 16 are needed: have the GPU reset (nvidia-smi --gpu-reset -i 3) or oar7 rebooted; have it replaced if it "
        "comes again, or use cluster.min_workers=15"
    )
    assert "no worker fits on the cluster, and 1 are needed: drain and reboot oar7" in shortage_without([HOST_7], 0, 1)
    failures = row_of(("device", "ECC", 12, 10))
    assert decide(failures, 3, GPU_3).message == (
        "starting again without GPU 3 of oar7 from the checkpoint of step 10 (restart 1 of 3 without progress)"
    )
    assert not decide(failures, 3, GPU_3, "giving up: without").again
