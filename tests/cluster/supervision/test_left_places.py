"""Places that a job leaves after faults of devices: which slots lie in them, and the room beside them. Pure cases."""

import pytest

from cluster.device_health.device_fault import DeviceFault
from cluster.raycluster.placement import Node, WorkerRequest
from cluster.supervision.left_places import LeftPlace, is_left, room_without, shortage_without
from cluster.worker.messages import SlotInfo


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
        # Ray was started anew, and with it every host has another id
        ([GPU_3.by_host_name()], slot("n9", "3"), True),
        ([HOST_7.by_host_name()], slot("n9", "4"), True),
        ([HOST_7.by_host_name()], slot("n9", "4", host="oar8"), False),
    ],
)
def test_slots_in_places_that_were_left(left, info, covered):
    assert is_left(left, info) is covered


def node(name, cpus, gpus):
    return Node(f"host-{name}", cpus, gpus, cpus, gpus, id=name)


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
        ([Node("oar7", 16, 8, 16, 8, id="n9"), node("n8", 16, 8)], ONE_GPU, [GPU_3.by_host_name()], 15),
        ([Node("oar7", 16, 8, 16, 8, id="n9"), node("n8", 16, 8)], ONE_GPU, [HOST_7.by_host_name()], 8),
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
    assert "no worker fits on the cluster, and 1 is needed: drain and reboot oar7" in shortage_without([HOST_7], 0, 1)
