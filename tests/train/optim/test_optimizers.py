"""Tests of every optimizer at every ZeRO stage: weights of plain torch, and exact resumes."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration
from train.config import schema

RULES = get_args(schema.OptimizerConfig.model_fields["name"].annotation)
STEPS, LR = 4, 0.01


def tiny(stage: int, precision: str = "fp32") -> dict[str, Any]:
    """A configuration without biases: those of keys have gradients of rounding errors alone, which Adam scales up."""
    sizes = ("model.layers=1", "model.width=16", "model.bias=false")
    return configuration.to_dict(
        gloo_ranks.compose(
            *sizes, f"zero={stage}", f"precision={precision}", "optimizer.clip=0.5", "optimizer.eps=1e-6"
        )
    )


def with_rule(values: dict[str, Any], rule: str) -> Any:
    optimizer = {**values["optimizer"], "name": rule, "weight_decay": 0.1, "momentum": 0.8, "betas": [0.8, 0.9]}
    return configuration.parse({**values, "optimizer": optimizer})


def batches(rank: int, size: int) -> list[Any]:
    """This rank's rows of the global batch of each step."""
    generator = torch.Generator().manual_seed(0)
    own_batches = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 257, (4, 17), generator=generator)
        whole = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": torch.arange(16).expand(4, -1),
            "segments": torch.ones(4, 16, dtype=torch.int32),
        }
        own_batches.append({key: value[rank::size].contiguous() for key, value in whole.items()})
    return own_batches


@functools.cache
def plain(rule: str) -> dict[str, torch.Tensor]:
    """The weights after STEPS steps of plain torch."""
    from train.objectives import build_objective
    from train.optim.factory import build_optimizer, parameter_groups

    config = with_rule(tiny(0), rule)
    objective = build_objective(config, 257)
    optimizer = build_optimizer(config.optimizer, parameter_groups(objective, config.optimizer.weight_decay))
    for group in optimizer.param_groups:
        group["lr"] = LR
    for batch in batches(0, 1):
        optimizer.zero_grad()
        total, count = objective(batch)["loss"]
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        optimizer.step()
    return {name: p.detach() for name, p in objective.named_parameters()}


def trained(world: Any, emit: Any, values: dict[str, Any], rules: list[str]) -> dict[str, Any]:
    """For each optimizer, weights after STEPS steps, and whether resuming half-way once more gives the same bits."""
    from train.run import build_engine

    results, sizes = {}, SimpleNamespace(micro=4 // world.size, micro_batches=1)
    for rule in rules:
        config = with_rule(values, rule)
        (engine, _), ends = build_engine(config, 257, world, sizes), []

        def train_steps(part: slice) -> None:
            for batch in batches(world.rank, world.size)[part]:
                assert engine.train_step([batch], {"loss": 64}, LR, lambda: None).update_applied  # noqa: B023

        train_steps(slice(0, 2))
        saved = {(name, kind): view for (kind, name, _), view in copied_states(engine).items()}
        kinds: dict[str, list[str]] = {}
        for name, kind in saved:
            kinds.setdefault(name, []).append(kind)
        for _ in range(2):
            train_steps(slice(2, None))
            end = copied_states(engine)
            ends.append(
                end | {("forward", name, 0): weight for name, weight in gloo_ranks.whole_weights(engine).items()}
            )
            engine.load(lambda shard, kind: saved[shard.name, kind], kinds, 2)  # noqa: B023
        first, second = ends
        results[rule] = {
            "same": first.keys() == second.keys() and all(torch.equal(v, second[key]) for key, v in first.items()),
            "kinds": sorted({kind for kind, *_ in first} - {"weight", "forward"}),
            "weights": {(name, start): v.numpy() for (kind, name, start), v in first.items() if kind == "weight"},
        }
    return results


def copied_states(engine: Any) -> dict[tuple[str, str, int], torch.Tensor]:
    """A copy of this rank's state: (kind, parameter, start of the shard) -> values."""
    states = {}
    for shard in engine.param_shards:
        states |= {(kind, shard.name, shard.start): view.clone() for kind, view in engine.states(shard).items()}
    return states


@pytest.mark.parametrize(("stage", "workers"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_optimizers_at_any_stage_equal_torch_and_resume_exactly(stage: int, workers: int):
    ranks = gloo_ranks.run(workers, trained, tiny(stage), list(RULES), timeout=300)
    for rule in RULES:
        expected = plain(rule)
        covered = dict.fromkeys(expected, 0)
        for rank in ranks:
            assert rank[rule]["same"], rule
            for (name, start), values in rank[rule]["weights"].items():
                right = expected[name].flatten()[start : start + len(values)]
                torch.testing.assert_close(torch.from_numpy(values), right, rtol=1e-4, atol=1e-5)
                covered[name] += len(values)
        assert all(n >= expected[name].numel() for name, n in covered.items())


STATE_KINDS = {
    "sgd": [],
    "momentum": ["momentum_buffer"],
    "nesterov": ["momentum_buffer"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "adamw": ["exp_avg", "exp_avg_sq"],
    "adagrad": ["sum"],
    "rmsprop": ["square_avg"],
    "lion": ["exp_avg"],
    "muon": ["exp_avg", "exp_avg_sq", "momentum_buffer"],
}


@pytest.mark.parametrize(
    ("stage", "rules"), [(0, list(RULES)), (1, ["lion", "muon"]), (2, ["muon"]), (3, ["adagrad", "muon"])]
)
def test_optimizers_in_bf16_keep_fp32_state_and_resume_exactly(stage: int, rules: list[str]):
    for rank in gloo_ranks.run(2, trained, tiny(stage, "bf16"), rules, timeout=300):
        assert list(rank) == rules
        assert all(result["kinds"] == STATE_KINDS[rule] for rule, result in rank.items())
        assert all(result["same"] for result in rank.values())


def test_muon_resumes_in_another_world_size_and_stage(make, corpus: Path):
    muon = ("optimizer=muon", "optimizer.lr=1e-2", "steps=6", "save_every=3")
    whole = make(*muon, "zero=3", "cluster.workers=2", name="whole")
    parts = make(*muon, "zero=3", "cluster.workers=2", name="parts")
    assert gloo_ranks.train_world(whole, corpus) == ["done", "done"]
    assert gloo_ranks.train_world(parts, corpus, {"event": "step", "step": 3}) == ["stopped", "stopped"]
    moved = make(*muon, "zero=1", "cluster.workers=1", name="parts")
    assert gloo_ranks.train_world(moved, corpus) == ["done"]
    actual, expected = gloo_ranks.metrics(moved), gloo_ranks.metrics(whole)
    for line, expected_line in zip(actual, expected, strict=True):
        assert line["data_hash"] == expected_line["data_hash"]
    losses = torch.tensor([line["loss"] for line in actual])
    torch.testing.assert_close(losses, torch.tensor([line["loss"] for line in expected]), rtol=1e-5, atol=0)
    assert losses[-1] < losses[0]
