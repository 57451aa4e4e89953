"""What is made of a dry run: fits or not, in words, time and cost; with dry runs made up for the purpose."""

import itertools

import pytest
import torch
from helpers import gloo_ranks

from train.planning import collectives
from train.planning.allocations import Peak
from train.planning.choices import Choice, Cluster, alternatives, between, least_state, missing
from train.planning.dry_mode import Collective, Work
from train.planning.dry_run import DryRun, PlannedRows
from train.planning.gpus import FRAGMENTATION, GPUS, OUTSIDE_TORCH, REACHED_MEMORY, REACHED_PRODUCTS
from train.planning.step_time import StepTime, step_time

GPU = GPUS["h100"]
PRODUCT = Work("forward", False, "mm", torch.bfloat16, 989e12, 1)
COPY = Work("step", True, "add_", torch.float32, 0.0, int(GPU.bandwidth))


def made_up(nbytes: float, work: dict[Work, int], sent: list[Collective], micro_batches: int = 1) -> DryRun:
    peak = Peak(int(nbytes), {"moments": int(nbytes)})
    return DryRun(peak, peak, int(nbytes), work, sent, 10**9, 6e9, PlannedRows(2, micro_batches))


def test_operator_takes_the_longer_of_products_and_memory():
    fabric = collectives.Fabric()
    time = step_time(made_up(1, {PRODUCT: 2, COPY: 3}, [], micro_batches=5), GPU, 1, fabric)
    assert time.compute_s == pytest.approx(4 * 2 / REACHED_PRODUCTS + 3 / REACHED_MEMORY)  # four before the last
    assert time.exposed_s == 0


def test_collectives_hide_behind_their_phase_but_not_behind_the_update():
    fabric, gather = collectives.Fabric(), collectives.Transfer("all_gather", 1e9, 1, 1, "update")
    alone = collectives.seconds(gather, 16, fabric)
    sent = [Collective(phase, True, "_allgather_base_", 10**9) for phase in ("forward", "step")]
    busy = PRODUCT._replace(last=True)
    assert step_time(made_up(1, {}, sent), GPU, 16, fabric).exposed_s == pytest.approx(2 * alone)
    assert step_time(made_up(1, {busy: 1}, sent), GPU, 16, fabric).exposed_s == pytest.approx(alone)
    assert step_time(made_up(1, {}, sent), GPU, 1, fabric).exposed_s == 0


def test_what_does_not_fit_says_what_is_missing_and_what_would_change_it():
    config, cluster = gloo_ranks.compose("zero=2"), Cluster(GPU, 1)
    tight = Choice(config, cluster, made_up(90e9, {}, []), StepTime(1.0, 0.0))
    lacks = 90 * (1 + FRAGMENTATION) + OUTSIDE_TORCH / 1e9 - 80
    assert not tight.fits
    words = missing(tight)
    assert f"{lacks:.1f} GB a GPU are missing" in words
    for cure in ("zero=3", "batch.micro=1", "model.checkpoint_activations=true", "zero.offload=true", "2 nodes"):
        assert cure in words
    assert Choice(config, cluster, made_up(70e9, {}, []), StepTime(1.0, 0.0)).fits


def test_cost_follows_from_steps_and_their_time():
    config, cluster = gloo_ranks.compose("steps=3600"), Cluster(GPU, 2, 4)
    choice = Choice(config, cluster, made_up(1e9, {}, []), StepTime(1.5, 0.5))
    assert choice.gpu_hours == pytest.approx(3600 * 2 * 8 / 3600)
    assert choice.tokens_per_s == pytest.approx(4 * 16 / 2)


def test_alternatives_keep_the_global_batch():
    config = gloo_ranks.compose("batch.global=24", "cluster.workers=2")
    ways = list(alternatives(config, Cluster(GPU, 1, 2)))
    assert {way.batch.global_ for way in ways} == {24}
    assert {way.batch.micro for way in ways} == {1, 2, 4}
    made = {(way.zero.stage, way.model.checkpoint_activations) for way in ways}
    assert made == set(itertools.product(range(4), (False, "attention", "mlp", True)))


@pytest.mark.parametrize(("stage", "each"), [(0, 4 + 4 + 8), (1, 8 + 12 / 4), (2, 4 + 16 / 4), (3, 20 / 4)])
def test_least_state_by_stage(stage: int, each: float):
    config = gloo_ranks.compose(f"zero={stage}", "cluster.workers=4")
    assert least_state(config, 1000, 4) == pytest.approx(1000 * each)


def test_deeper_model_lies_on_the_line_through_two_depths():
    less, more = made_up(10e9, {}, []), made_up(14e9, {}, [])
    run, time = between((less, StepTime(1.0, 0.5)), (more, StepTime(1.5, 0.5)), (80 - 4) / 4)
    assert run.step.nbytes == 10e9 + 76 * 1e9
    assert run.step.parts == {"moments": 86e9}
    assert (time.compute_s, time.exposed_s) == (1.0 + 76 * 0.125, 0.5)
