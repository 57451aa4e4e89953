"""The cores near a GPU, as tables; binding itself in a process of its own."""

import multiprocessing
import os

import pytest

from cluster.host import affinity


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0-3,8,16-17\n", {0, 1, 2, 3, 8, 16, 17}), ("5", {5}), ("\n", set()), ("", set())],
)
def test_list_of_cores_as_the_kernel_writes_it(text, cores):
    assert affinity.parse_cpulist(text) == cores


@pytest.mark.parametrize(
    ("local", "allowed", "least", "cores"),
    [
        # two sockets, all allowed: those of the GPU's own
        ("0-31", range(64), 2, range(32)),
        ("32-63", range(64), 2, range(32, 64)),
        ("0-15,32-47", range(64), 2, [*range(16), *range(32, 48)]),
        # of a container's or a batch system's share, those that are near
        ("0-31", range(24, 40), 2, range(24, 32)),
        # too few, or none, are near: all of the share, and never more than it
        ("0-31", range(31, 40), 2, range(31, 40)),
        ("0-31", range(40, 48), 2, range(40, 48)),
        # one socket, or a machine that does not say
        ("0-7", range(8), 2, range(8)),
        ("", range(8), 2, range(8)),
    ],
)
def test_cores_near_a_gpu_are_those_of_its_node_that_are_allowed(local, allowed, least, cores):
    assert affinity.cores_near(local, set(allowed), least) == set(cores)


def _bind(devices, address, least, answers):
    affinity.PCI_DEVICES = devices
    answers.put((affinity.bind_to_device(address, least), os.sched_getaffinity(0)))


@pytest.mark.parametrize("known", [True, False])
def test_process_keeps_to_the_cores_that_the_kernel_names(tmp_path, known):
    allowed = os.sched_getaffinity(0)
    core = max(allowed)
    (tmp_path / "0000:3b:00.0").mkdir()
    if known:
        (tmp_path / "0000:3b:00.0" / "local_cpulist").write_text(f"{core}\n")
    forks = multiprocessing.get_context("fork")
    answers = forks.Queue()
    process = forks.Process(target=_bind, args=(tmp_path, "0000:3B:00.0", 1, answers))
    process.start()
    count, cores = answers.get(timeout=30)
    process.join()
    assert cores == ({core} if known else allowed)
    assert count == len(cores)
