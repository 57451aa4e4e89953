"""The gradient proof: it passes for every family, stage, accumulation and world, and planted faults are all caught."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gloo_ranks
from helpers.gradient_faults import FAULTS

from train.config import load as configuration
from train.engine.gradient_check import sampled_names

FAMILIES = ("gpt", "llama", "rnn", "gru", "lstm", "bert", "t5", "transformer")
CHECKED = ("verify.gradient=first_step", "steps=1", "eval_every=0", "save_every=0")


@pytest.fixture
def checked(corpus: Path, tmp_path: Path):
    """checked(*overrides) -> a run of one step whose gradient is proven, on the corpus."""

    def composed(*overrides: str, name: str = "run"):
        return gloo_ranks.on_corpus(corpus, tmp_path / name, *CHECKED, *overrides)

    return composed


def report(config: Any) -> dict[str, Any]:
    return json.loads((Path(config.run.dir or "") / "gradient.json").read_text())


@pytest.mark.parametrize(("stage", "workers"), [(s, w) for s in range(4) for w in (1, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_of_every_stage_and_world_is_proven(checked, corpus: Path, stage: int, workers: int, precision: str):
    keys = f"zero={stage}", f"cluster.workers={workers}", f"precision={precision}", "batch.micro=2", "model.dropout=0.2"
    config = checked(*keys, "batch.global=8")
    assert set(gloo_ranks.train_world(config, corpus)) == {"done"}
    found = report(config)
    assert found["equal"]
    assert found["compared"] == found["parameters"] > 10
    assert (found["stage"], found["workers"], found["accumulation"]) == (stage, workers, 4 // workers)
    assert 0 < found["largest"] < (1e-5 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize(("family", "stage"), zip(FAMILIES, itertools.cycle((3, 0, 2)), strict=False))
def test_gradient_of_every_tiny_experiment_is_proven(corpus: Path, tmp_path: Path, family: str, stage: int):
    here = ["data.paths=[x]", f"data.dir={corpus}", f"run.dir={tmp_path / 'run'}", "cluster.workers=2"]
    config = configuration.load([f"experiment={family}_tiny", *gloo_ranks.TEXT, *here, *CHECKED, f"zero={stage}"])
    assert set(gloo_ranks.train_world(config, corpus)) == {"done"}
    assert report(config)["largest"] < 1e-4


@pytest.mark.parametrize("stage", [0, 2])
def test_run_that_proves_its_gradient_is_the_same_run(make, corpus: Path, stage: int):
    keys = f"zero={stage}", "precision=bf16", "model.dropout=0.1", "steps=4"
    plain = make(*keys, name="plain")
    proven = make(*keys, "verify.gradient=first_step", name="proven")
    for config in (plain, proven):
        assert set(gloo_ranks.train_world(config, corpus)) == {"done"}
    assert gloo_ranks.metrics(proven) == gloo_ranks.metrics(plain)
    expected, found = gloo_ranks.state(plain, 4), gloo_ranks.state(proven, 4)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stage", [0, 1])
def test_loss_scale_that_overflows_is_lowered_for_the_proof_alone(checked, corpus: Path, stage: int):
    config = checked("precision=fp16", f"zero={stage}", "cluster.workers=1")
    assert set(gloo_ranks.train_world(config, corpus)) == {"done"}
    assert report(config)["equal"]


def train_with(context: Any, emit: Any, fault: str, config: dict[str, Any], corpus: str) -> str:
    FAULTS[fault]()
    return gloo_ranks.train(context, emit, config, corpus)


@pytest.mark.parametrize(("fault", "stage"), zip(FAULTS, itertools.cycle(range(4)), strict=False))
def test_planted_fault_is_caught_and_named(checked, corpus: Path, fault: str, stage: int):
    keys = f"zero={stage}", "batch.global=8", "batch.micro=2", "optimizer.clip=0.5", "objective.label_smoothing=0.1"
    config = checked(*keys)
    for result in gloo_ranks.run(2, train_with, fault, configuration.to_dict(config), str(corpus)):
        assert "the gradient of the first batch is not that of plain autograd" in result
        assert "backbone." in result
    assert not report(config)["equal"]
    assert not gloo_ranks.metrics(config)


def test_run_whose_gradient_is_wrong_does_not_begin(checked, corpus: Path):
    config = checked("zero=2")
    results = gloo_ranks.run(2, train_with, "counts_are_doubled", configuration.to_dict(config), str(corpus))
    assert "ZeRO stage 2, 2 workers" in results[0]
    assert not (Path(config.run.dir or "") / "checkpoints").exists()


def test_large_model_is_sampled_evenly():
    sizes = {str(n): 50_000_000 for n in range(16)}
    assert sampled_names(sizes) == ["0", "4", "8", "12"]
    assert sampled_names({"a": 3, "b": 4}) == ["a", "b"]
