"""The order of ranks, and what a rank's environment is told of cluster.deterministic; without Ray."""

import itertools
import time

import pytest

from cluster.host.stop_request import StopRequest
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.slots import Slot, rank_order
from cluster.supervision.supervisor import Supervisor
from cluster.worker.messages import RendezvousAddress, SlotInfo
from train.config import load as configuration
from train.distributed import determinism


def slot(ip, node, *gpus):
    return SlotInfo(node, f"host-{ip}", ip, 1, gpus)


@pytest.mark.parametrize(
    "ranks",
    [
        [slot("10.0.0.1", "b", "0"), slot("10.0.0.1", "b", "1"), slot("10.0.0.2", "a", "0")],
        [slot("10.0.0.1", "b", gpu) for gpu in ("0", "2", "7", "10", "11")],
        [slot("10.0.0.1", "b", gpu) for gpu in ("GPU-0f3a", "GPU-1a00", "GPU-9bcd")],
        [slot("10.0.0.1", "a", "3"), slot("10.0.0.1", "b", "0")],
    ],
)
def test_ranks_follow_host_and_gpu_in_whatever_order_slots_come_up(ranks):
    for came_up in itertools.permutations(ranks):
        assert [came_up[n] for n in rank_order(came_up)] == ranks


def test_slots_without_gpus_keep_their_order_on_a_host():
    assert rank_order([slot("10.0.0.2", "a"), slot("10.0.0.1", "b"), slot("10.0.0.2", "a")]) == [1, 0, 2]
    assert rank_order([]) == []


@pytest.mark.parametrize("deterministic", [True, False])
def test_orders_of_all_ranks_carry_the_deterministic_environment(tmp_path, deterministic):
    config = configuration.load([f"run.dir={tmp_path}", "cluster.workers=2", f"cluster.deterministic={deterministic}"])
    job = Job(config, "", "module:target", "job", lambda event: None, StopRequest(), StartupClock(time.time()))
    slots = [Slot(None, n, {}, info=slot("10.0.0.1", "b", str(n))) for n in range(2)]
    orders = Supervisor(job, "gpu").make_orders(slots, RendezvousAddress("10.0.0.1", 1, 0), {"b": {"CPU": 4.0}})
    fixed = determinism.environment(True)
    assert [fixed.items() <= order.env.items() for order in orders] == [deterministic] * 2
    assert [fixed.keys().isdisjoint(order.env) for order in orders] == [not deterministic] * 2
