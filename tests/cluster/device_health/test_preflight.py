"""The checks before training: the judge as tables, and the checks themselves on real gloo ranks."""

import time

import pytest
import torch
from helpers import gloo_ranks

from cluster.device_health.preflight import DeviceProbe, PreflightFailed, check_ranks, measure_network
from cluster.device_health.preflight_judge import Judgement, Measurement, judge

H100 = "NVIDIA H100 80GB HBM3"


def gpu(rank, **more):
    fields = {"kind": H100, "products": 40, "tflops": 650.0, "free_mib": 80_000, "memory_mib": 81_559}
    return Measurement(rank, f"node{rank // 2}", str(rank % 2), **{**fields, **more})


def devices(**odd):
    return [gpu(0), gpu(1, tflops=661.0), gpu(2, tflops=640.0), gpu(3, **odd)]


@pytest.mark.parametrize(
    ("odd", "failed", "notes"),
    [
        ({}, {}, ()),
        ({"tflops": 560.0}, {}, ()),
        ({"wrong_products": 3}, {3: "3 of 40 matrix products were wrong"}, ()),
        ({"wrong_words": 4096}, {3: "4,096 words of its memory did not hold what was written"}, ()),
        (
            {"tflops": 311.0},
            {},
            ("rank 3 on node1 GPU 1 is slow: 311 TFLOP/s, where 645 is the median",),
        ),
        # another kind of GPU is compared with its own kind
        ({"tflops": 311.0, "kind": "NVIDIA A100-SXM4-80GB"}, {}, ()),
        (
            {"free_mib": 40_000},
            {},
            ("rank 3 on node1 GPU 1: 41,559 of 81,559 MiB of its memory are held by something else",),
        ),
    ],
)
def test_judgement_by_measurements(odd, failed, notes):
    assert judge(devices(**odd)) == Judgement(failed, notes)


def test_one_rank_alone_is_no_slower_than_its_own_median():
    assert judge([Measurement(0, "node0", tflops=0.01)]) == Judgement({})


class BrokenProbe(DeviceProbe):
    """A probe of a device with a fault: slower, wrong in one bit of one product in three, or forgetful."""

    def __init__(self, device, fault):
        super().__init__(device)
        self.fault, self.calls = fault, 0

    def multiply(self):
        product = super().multiply()
        self.calls += 1
        if self.fault == "slow":
            time.sleep(0.05)
        elif self.fault == "wrong" and self.calls % 3 == 0:
            product.view(torch.int32)[7, 11] ^= 1 << 23
        return product

    def count_wrong_words(self):
        return super().count_wrong_words() + 12 * (self.fault == "forget")


def check_with_fault(context, emit, faults):
    """What this rank's check ended with: "" or the reason."""
    probe = BrokenProbe(context.device, faults.get(context.rank, ""))
    try:
        check_ranks(context, lambda event: emit(event.to_json()), probe, seconds=0.4)
    except PreflightFailed as failure:
        return str(failure)
    return ""


def test_wrong_and_forgetful_ranks_fail_and_the_slow_one_is_named():
    ranks = gloo_ranks.start(4, check_with_fault, {1: "wrong", 2: "slow", 3: "forget"}).wait(120)
    assert [rank.code for rank in ranks] == [0] * 4, ranks
    results = [rank.result for rank in ranks]
    assert results[0] == results[2] == ""
    assert results[1].startswith("failed its preflight: ")
    assert results[1].endswith(" matrix products were wrong")
    assert results[3] == "failed its preflight: 12 words of its memory did not hold what was written"
    notes = [event["text"] for event in ranks[0].events]
    assert any(note.startswith("preflight: rank 2 on ") and " is slow: " in note for note in notes), notes


def measure_all_reduce(context, emit):
    return measure_network(context, 0.2)


def test_network_is_measured_alike_on_all_ranks():
    first, second = gloo_ranks.run(2, measure_all_reduce)
    assert first == second > 0.01
