"""Tests of init.from and init.freeze with runs as sources: loaded weights, frozen ones, exact resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration
from train.objectives import build_objective
from train.optim.factory import parameter_groups
from train.optim.layerwise_lr import layer_depths, split_by_depth

STILL = ["steps=1", "optimizer.lr=1e-12"]
HALF = "init.freeze=['backbone.embed.*','backbone.blocks.0.*']"


@pytest.fixture(scope="module")
def origin(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of 8 steps, by two workers at ZeRO stage 2."""
    folder = tmp_path_factory.mktemp("origin")
    config = gloo_ranks.on_corpus(corpus, folder / "run", "zero=2", "cluster.workers=2")
    gloo_ranks.train_world(config, corpus)
    return config


def losses_of(config) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in gloo_ranks.metrics(config)])


def val_loss(config) -> float:
    return gloo_ranks.metrics(config)[-1]["val_loss"]


@pytest.mark.parametrize(("zero", "workers"), [(0, 1), (0, 2), (1, 2), (2, 1), (3, 1), (3, 2)])
def test_init_from_a_run_at_any_stage_and_world_size_loads_weights(make, corpus: Path, origin, zero: int, workers: int):
    config = make(*STILL, f"init.from={origin.run.dir}", f"zero={zero}", f"cluster.workers={workers}")
    gloo_ranks.train_world(config, corpus)
    assert val_loss(config) == pytest.approx(val_loss(origin), rel=1e-6)
    report = json.loads((Path(config.run.dir) / "init.json").read_text())
    assert (report["kind"], report["fresh"], report["left"]) == ("a run, step 8", [], [])
    assert sorted(report["loaded"]) == sorted(parameter_names(config))


def parameter_names(config) -> list[str]:
    return [name.removeprefix("weight/") for name in gloo_ranks.state(config, 1) if name.startswith("weight/")]


def test_init_checkpoint_names_a_step_of_the_source_run(make, corpus: Path, origin):
    config = make(*STILL, f"init.from={origin.run.dir}", "init.checkpoint=4")
    gloo_ranks.train_world(config, corpus)
    at_4 = next(line for line in gloo_ranks.metrics(origin) if line["step"] == 4)
    assert val_loss(config) == pytest.approx(at_4["val_loss"], rel=1e-6)
    lost = make(*STILL, f"init.from={origin.run.dir}", "init.checkpoint=5", name="lost")
    assert "It has the steps 4, 8" in gloo_ranks.train_world(lost, corpus)[0]


def test_resumed_run_does_not_read_init_from_again(make, corpus: Path, origin, tmp_path: Path):
    source = shutil.copytree(origin.run.dir, tmp_path / "there")
    whole, parts = (make(f"init.from={source}", "cluster.workers=2", name=name) for name in ("whole", "parts"))
    gloo_ranks.train_world(whole, corpus)
    gloo_ranks.train_world(parts, corpus, {"event": "step", "step": 3})
    shutil.rmtree(source)
    assert gloo_ranks.train_world(parts, corpus) == ["done", "done"]
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)


def test_rollback_to_step_0_restores_the_loaded_weights(make, corpus: Path, origin):
    config = configuration.to_dict(make(f"init.from={origin.run.dir}"))
    weights = gloo_ranks.run(1, weights_after_rollback, config, str(corpus))[0]
    expected = gloo_ranks.state(origin, 8)
    assert all(torch.equal(torch.from_numpy(weight), expected[f"weight/{name}"]) for name, weight in weights.items())


def weights_after_rollback(world, emit, config, corpus: str):
    from train.data.corpus.shards import Corpus
    from train.data.loader import loaders
    from train.run import build_engine
    from train.stability.guard import Guard
    from train.state.train_state import TrainState

    config, corpus_ = configuration.parse(config), Corpus(corpus)
    loader, _ = loaders(corpus_, config, world)
    engine, _ = build_engine(config, corpus_.tokenizer.vocab_size, world, loader)
    nothing = (lambda: None, lambda state, why: None, lambda text: None)
    guard = Guard(config, world, corpus_, engine, loader, *nothing)
    guard._roll_back(TrainState())
    loader.close()
    return {name: weight.numpy() for name, weight in gloo_ranks.whole_weights(engine).items()}


def test_init_from_another_model_ends_the_run_before_training(make, corpus: Path, origin):
    config = make(f"init.from={origin.run.dir}", "model.layers=3", "cluster.workers=2")
    messages = gloo_ranks.train_world(config, corpus)
    assert messages[0] == messages[1]
    assert "model.layers is 3 here, 2 there" in messages[0]
    assert not (Path(config.run.dir) / "checkpoints").exists()


# frozen parameters


@pytest.mark.parametrize(
    ("zero", "workers", "precision"),
    [(0, 1, "fp32"), (0, 2, "bf16"), (1, 2, "fp32"), (2, 2, "bf16"), (3, 2, "fp32"), (3, 1, "bf16")],
)
def test_frozen_weights_stay_without_moments_and_resume_is_exact(make, corpus: Path, origin, zero, workers, precision):
    keys = [f"zero={zero}", f"cluster.workers={workers}", f"precision={precision}", f"init.from={origin.run.dir}", HALF]
    whole, parts = make(*keys, name="whole"), make(*keys, name="parts")
    gloo_ranks.train_world(whole, corpus)
    gloo_ranks.train_world(parts, corpus, {"event": "step", "step": 3})
    gloo_ranks.train_world(parts, corpus)
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)
    before, after, again = gloo_ranks.state(origin, 8), gloo_ranks.state(whole, 8), gloo_ranks.state(parts, 8)
    assert after.keys() == again.keys()
    assert all(torch.equal(after[key], again[key]) for key in after)
    frozen = [key for key in after if "embed" in key or "blocks.0" in key]
    assert frozen
    assert all(key.startswith("weight/") and torch.equal(after[key], before[key]) for key in frozen)
    moved = [key for key in after if key.startswith("weight/") and key not in frozen]
    assert moved
    assert not any(torch.equal(after[key], before[key]) for key in moved)
    assert all(f"exp_avg/{key.removeprefix('weight/')}" in after for key in moved)


def test_frozen_run_resumes_in_other_world_sizes_and_stages(make, corpus: Path, origin):
    keys = [f"init.from={origin.run.dir}", HALF]
    whole = make(*keys, "zero=2", "cluster.workers=2", name="whole")
    gloo_ranks.train_world(whole, corpus)
    for workers, zero, stop in ((2, 3, 3), (1, 0, 5), (2, 1, None)):
        part = make(*keys, f"cluster.workers={workers}", f"zero={zero}", name="parts")
        gloo_ranks.train_world(part, corpus, stop and {"event": "step", "step": stop})
    torch.testing.assert_close(losses_of(part), losses_of(whole), rtol=1e-5, atol=0)


def test_freeze_patterns_matching_nothing_or_all_are_refused(make, corpus: Path):
    message = gloo_ranks.train_world(make("init.freeze=['backbone.layers.*']"), corpus)[0]
    assert "'backbone.layers.*' matches no parameter. There are backbone.embed.weight" in message
    assert "leaves nothing to train" in gloo_ranks.train_world(make("init.freeze=['*']"), corpus)[0]


def test_plan_event_counts_trained_parameters(make, corpus: Path):
    config = make("zero=3", HALF, "steps=1")
    ranks = gloo_ranks.start(1, gloo_ranks.train, configuration.to_dict(config), str(corpus)).wait()
    plan = next(e for e in ranks[0].events if e["event"] == "plan")
    sizes = {key: value.numel() for key, value in gloo_ranks.state(config, 1).items() if key.startswith("weight/")}
    assert plan["params"] == sum(sizes.values())
    assert plan["trained"] == sum(size for key, size in sizes.items() if "embed" not in key and "blocks.0" not in key)


# layer-wise learning-rate decay


def test_layer_decay_scales_rates_by_distance_from_the_top(make_config):
    objective = build_objective(make_config("llama_tiny", layers=3), 257)
    names = [name for name, _ in objective.named_parameters()]
    depth = layer_depths(names)
    assert (depth["backbone.embed.weight"], depth["backbone.norm.weight"], depth["head.weight"]) == (0, 4, 4)
    assert [depth[f"backbone.blocks.{n}.mlp.down.weight"] for n in range(3)] == [1, 2, 3]
    groups = split_by_depth(parameter_groups(objective, 0.1), names, 0.5)
    scale, decays = {}, {}
    for group in groups:
        scale |= dict.fromkeys(group["names"], group["lr_scale"])
        decays |= dict.fromkeys(group["names"], group["weight_decay"])
    assert sorted(scale) == sorted(names)
    assert all(value == 0.5 ** (4 - depth[name]) for name, value in scale.items())
    named = dict(objective.named_parameters())
    for group in groups:
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))
    assert decays["backbone.blocks.1.mlp.down.weight"] == 0.1
    assert decays["backbone.blocks.1.mlp_norm.weight"] == 0.0


def test_layer_depth_continues_from_one_stack_to_the_next():
    names = ["embed.weight", "encoder.0.a", "encoder.1.a", "between.a", "decoder.0.a", "decoder.0.b", "head.a"]
    assert list(layer_depths(names).values()) == [0, 1, 2, 2, 3, 3, 4]


def test_layer_decay_gives_the_same_update_at_every_stage(make, corpus: Path):
    """With plain SGD an update is the rate times the gradient, so its ratio to one without decay is known."""
    keys = ["optimizer=sgd", "optimizer.clip=0", "steps=1", "eval_every=0", "zero=0"]
    states = {}
    for decay in (1.0, 0.5):
        config = make(*keys, f"optimizer.layer_decay={decay}", name=f"decay-{decay}")
        gloo_ranks.train_world(config, corpus)
        states[decay] = gloo_ranks.state(config, 1)
    still = make(*keys, "optimizer.lr=1e-30", name="still")
    gloo_ranks.train_world(still, corpus)
    start = gloo_ranks.state(still, 1)
    for key, depth in (("head", 3), ("blocks.1.mlp.down.weight", 2), ("blocks.0.mlp.down.weight", 1), ("embed", 0)):
        for name in (name for name in start if key in name):
            change = [states[decay][name] - start[name] for decay in (1.0, 0.5)]
            torch.testing.assert_close(change[1], change[0] * 0.5 ** (3 - depth), rtol=1e-3, atol=1e-7)
    for zero, workers in ((1, 2), (3, 2)):
        keys[-1] = f"zero={zero}"
        config = make(*keys, "optimizer.layer_decay=0.5", f"cluster.workers={workers}", name=f"z{zero}")
        gloo_ranks.train_world(config, corpus)
        for name, value in gloo_ranks.state(config, 1).items():
            torch.testing.assert_close(value, states[0.5][name], rtol=1e-4, atol=1e-6)
