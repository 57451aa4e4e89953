"""The model of what ranks exchange: its bytes against the kernel's count, and its shape over the number of ranks."""

import math

import pytest

from bench import collectives
from train.planning import collectives as costs


def sent(stage, ranks, accumulation, hpz=False):
    moved = costs.transfers(costs.LLAMA_7B, stage, accumulation, hpz)
    return sum(costs.bytes_sent(transfer, ranks) for transfer in moved if not transfer.inside)


def test_stage_1_reduces_once_a_step_and_the_others_each_micro_batch():
    params = costs.LLAMA_7B.params
    share = 1023 / 1024
    assert sent(1, 1024, 4) == pytest.approx(share * params * (2 * 4 + 2))
    assert sent(2, 1024, 4) == pytest.approx(share * params * (4 * 2 * 4 + 2))
    assert sent(3, 1024, 4) == pytest.approx(share * params * 4 * (2 + 2 + 4))
    assert sent(3, 1024, 4, hpz=True) == pytest.approx(share * params * 4 * (2 + 4))


def test_rings_cost_a_hop_for_each_rank_and_trees_the_logarithm():
    fabric = costs.Fabric()
    gather = costs.Transfer("all_gather", 0.0, 1, 1, "forward")
    reduce = costs.Transfer("all_reduce", 0.0, 1, 1, "backward")
    assert costs.seconds(gather, 4096, fabric) / costs.seconds(gather, 1024, fabric) == pytest.approx(4.0, rel=0.01)
    more = costs.seconds(reduce, 4096, fabric) - costs.seconds(reduce, 1024, fabric)
    assert more == pytest.approx(2 * math.log2(4) * fabric.hop_between)


def test_weights_that_have_no_room_are_said_so():
    fabric = costs.Fabric()
    assert costs.fits(costs.LLAMA_7B, 1, 8, fabric)
    assert not costs.fits(costs.LLAMA_70B, 2, 4096, fabric)
    assert costs.fits(costs.LLAMA_70B, 3, 32, fabric)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_modelled_bytes_are_those_that_the_kernel_counts(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(collectives.results.REPOSITORY)
    counted, modelled = collectives.count(stage, 2, 2, tmp_path)
    assert counted == pytest.approx(modelled, rel=collectives.TOLERANCE)
