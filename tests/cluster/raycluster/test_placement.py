"""Placement of workers on nodes, and the messages where they do not fit, as tables of pure cases."""

import pytest

from cluster.raycluster import status
from cluster.raycluster.placement import (
    Node,
    WorkerRequest,
    choose_device,
    default_workers,
    describe_held_gpus,
    initial_workers,
    place_workers,
    threads_per_worker,
)
from train.errors import UserError


def node(name, cpus, gpus=0, free_cpus=None, free_gpus=None):
    return Node(name, cpus, gpus, cpus if free_cpus is None else free_cpus, gpus if free_gpus is None else free_gpus)


@pytest.mark.parametrize(
    ("nodes", "request_", "workers", "waiting"),
    [
        ([node("a", 2)], WorkerRequest(2, 1, 0), {"a": 2}, 0),
        ([node("a", 2), node("b", 8)], WorkerRequest(6, 1, 0), {"b": 6}, 0),
        ([node("a", 2), node("b", 8)], WorkerRequest(10, 1, 0), {"b": 8, "a": 2}, 0),
        ([node("a", 16, 4), node("b", 2, 4)], WorkerRequest(6, 1, 1), {"a": 4, "b": 2}, 0),
        ([node("a", 3), node("b", 3)], WorkerRequest(2, 2, 0), {"a": 1, "b": 1}, 0),
        ([node("a", 8, free_cpus=3)], WorkerRequest(5, 1, 0), {"a": 3}, 2),
        ([node("a", 8, 8, free_gpus=0)], WorkerRequest(1, 1, 1), {}, 1),
    ],
)
def test_place_workers_packs_free_nodes_and_counts_the_waiting(nodes, request_, workers, waiting):
    placement = place_workers(nodes, request_)
    assert placement.workers == workers
    assert placement.waiting == waiting


@pytest.mark.parametrize(
    ("nodes", "request_", "words"),
    [
        ([node("me", 2)], WorkerRequest(3, 1, 0), ["only 2 fit", "me: 2 cores", "1 core short", "cluster.workers=2"]),
        ([node("me", 2)], WorkerRequest(1, 4, 0), ["none fits", "2 cores short", "fewer cluster.cpus_per_worker"]),
        (
            [node("a", 64, 4), node("b", 64, 4)],
            WorkerRequest(9, 1, 1),
            ["only 8 fit", "a: 64 cores, 4 GPUs", "1 GPU short"],
        ),
        (
            [node("a", 4, 8), node("b", 8, 0)],
            WorkerRequest(6, 1, 1),
            ["only 4 fit", "1 core short of another", "1 GPU short"],
        ),
        ([], WorkerRequest(1, 1, 0), ["none fits"]),
    ],
)
def test_request_that_never_fits_is_refused_with_each_nodes_shortage(nodes, request_, words):
    with pytest.raises(UserError) as refused:
        place_workers(nodes, request_)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "least", "size"),
    [
        ([node("a", 4)], None, 4),
        ([node("a", 4)], 2, 4),
        ([node("a", 3)], 2, 3),  # all that there ever is
        ([node("a", 2), node("b", 4, free_cpus=1)], 2, 3),  # others use the rest: it may join later
        ([node("a", 4, free_cpus=0)], 2, 2),  # nothing is free: so many are waited for
        ([node("a", 4, free_cpus=0)], None, 4),
    ],
)
def test_initial_workers_are_as_many_as_there_is_room_for(nodes, least, size):
    request = WorkerRequest(4, 1, 0, least)
    assert initial_workers(place_workers(nodes, request), request) == size


def test_fewer_cores_than_min_workers_need_are_refused():
    with pytest.raises(UserError, match=r"cluster.min_workers=3 asks for 3 workers of 1 core; only 2 fit"):
        place_workers([node("a", 2)], WorkerRequest(4, 1, 0, 3))


@pytest.mark.parametrize(
    ("asked", "gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 2, "gpu"), ("cpu", 2, "cpu"), ("gpu", 2, "gpu")],
)
def test_device_auto_is_gpu_where_a_node_has_one(asked, gpus, device):
    assert choose_device(asked, [node("a", 4, 0), node("b", 4, gpus)]) == device


def test_device_gpu_without_gpus_is_refused():
    with pytest.raises(UserError, match="no node has a GPU"):
        choose_device("gpu", [node("a", 4)])


@pytest.mark.parametrize(
    ("nodes", "device", "cpus_per_worker", "workers"),
    [
        # without a GPU two, where they fit: on one core one; on many hosts no more
        ([node("a", 8)], "cpu", 1, 2),
        ([node("a", 1)], "cpu", 1, 1),
        ([node("a", 3)], "cpu", 2, 1),
        ([node("a", 1), node("b", 1)], "cpu", 1, 2),
        ([node("a", 64), node("b", 64)], "cpu", 1, 2),
        # one a GPU
        ([node("a", 8, 1)], "gpu", 1, 1),
        ([node("a", 8, 2)], "gpu", 1, 2),
        ([node("a", 64, 8)], "gpu", 1, 8),
        ([node("a", 64, 8), node("b", 64, 8)], "gpu", 1, 16),
        ([node("head", 8), node("a", 64, 4), node("b", 64, 8)], "gpu", 1, 12),
        # as many as their cores are enough for
        ([node("a", 4, 8), node("b", 64, 8)], "gpu", 2, 10),
        # one a GPU that nobody holds; where all are held the job waits for all, and says for whom
        ([node("a", 64, 8, free_gpus=3)], "gpu", 1, 3),
        ([node("a", 64, 8, free_gpus=0), node("b", 64, 8, free_gpus=2)], "gpu", 1, 2),
        ([node("a", 64, 8, free_gpus=0), node("b", 64, 8, free_gpus=0)], "gpu", 1, 16),
        # CPUs were asked for, beside GPUs
        ([node("a", 64, 8)], "cpu", 1, 2),
        # nothing fits: one is asked for, and refused with what is missing
        ([node("a", 1, 1)], "gpu", 4, 1),
        ([], "cpu", 1, 1),
    ],
)
def test_workers_left_out_are_one_a_gpu_or_two_on_cpus(nodes, device, cpus_per_worker, workers):
    assert default_workers(nodes, device, cpus_per_worker) == workers


@pytest.mark.parametrize(
    ("nodes", "workers", "text"),
    [
        ([node("a", 64, 8)], 8, ""),
        ([node("a", 64, 8, free_gpus=0)], 8, ""),  # the job waits, and that is told elsewhere
        (
            [node("a", 64, 8, free_gpus=3)],
            3,
            "cluster.workers is not set: the job takes 3 of the 8 GPUs of the cluster, as 5 are held: "
            "first (pid 7 on a) holds a: 5 GPUs",
        ),
        (
            [node("a", 64, 2, free_gpus=1)],
            1,
            "cluster.workers is not set: the job takes 1 of the 2 GPUs of the cluster, as 1 is held: "
            "first (pid 7 on a) holds a: 5 GPUs",
        ),
    ],
    ids=["none held", "all held", "five held", "one held"],
)
def test_gpus_that_others_hold_are_told_with_their_holders(nodes, workers, text):
    holder = status.JobHolding("first", "a", 7, 1.0, {"a": "5 GPUs"})
    assert describe_held_gpus(nodes, workers, [holder]) == text


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_workers_left_out_always_fit_on_a_machine_with_gpus(gpus):
    nodes = [node("me", 16, gpus)]
    request = WorkerRequest(default_workers(nodes, choose_device("auto", nodes), 1), 1, 1)
    assert place_workers(nodes, request).workers == {"me": gpus}


def test_two_workers_asked_for_on_one_gpu_are_refused_with_the_cure():
    with pytest.raises(UserError, match=r"asks for 2 workers of 1 core and 1 GPU; only 1 fit[\s\S]*cluster.workers=1"):
        place_workers([node("me", 16, 1)], WorkerRequest(2, 1, 1))


@pytest.mark.parametrize(
    ("device", "cpus_per_worker", "cpus", "gpus", "threads"),
    [
        ("cpu", 1, 64, 0, 1),
        ("cpu", 8, 64, 8, 8),
        ("gpu", 1, 64, 8, 8),
        ("gpu", 1, 12, 8, 1),
        ("gpu", 4, 12, 8, 4),
        ("gpu", 1, 6, 1, 6),
        ("gpu", 1, 0, 0, 1),  # a node that says nothing
    ],
)
def test_threads_are_the_cores_asked_for_or_the_share_of_a_gpu(device, cpus_per_worker, cpus, gpus, threads):
    assert threads_per_worker(device, cpus_per_worker, cpus, gpus) == threads
