"""Tests of a run's first weights: the same at every stage and world, each rank its share, none drawn in vain."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration
from train.models import initial_weights
from train.objectives import build_objective

BLOCK = 1000
"""Elements of a block in these tests, so that most matrices have several."""
VOCABULARY = 257
SIZES = ("model.layers=1", "model.width=32", "optimizer=adamw", "batch.global=4")
FROZEN = "init.freeze=['backbone.embed.*']"
CASES = [(stage, precision, keys) for stage in range(4) for precision in ("fp32", "bf16") for keys in ((), (FROZEN,))]


def composed(stage: int, precision: str, keys: tuple[str, ...]) -> dict[str, Any]:
    return configuration.to_dict(gloo_ranks.compose(*SIZES, f"zero={stage}", f"precision={precision}", *keys))


def rows(rank: int, size: int) -> dict[str, torch.Tensor]:
    """This rank's rows of a batch of four."""
    tokens = torch.randint(0, VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    whole = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": torch.arange(16).expand(4, -1),
        "segments": torch.ones(4, 16, dtype=torch.int32),
    }
    return {key: value[rank::size].contiguous() for key, value in whole.items()}


def begin(world, emit, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each configuration: this rank's masters, the weights of the forward pass, the elements drawn, two losses."""
    from train.models.initial_weights import InitialWeights
    from train.run import build_engine

    initial_weights.BLOCK, read, drawn = BLOCK, InitialWeights.read, []

    def counted(weights: Any, name: str, start: int, numel: int) -> torch.Tensor:
        drawn.append(numel)
        return read(weights, name, start, numel)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a rank sent its weights to others")

    InitialWeights.read, broadcast = counted, torch.distributed.broadcast
    found = []
    for values in cases:
        drawn.clear()
        sizes = SimpleNamespace(micro=4 // world.size, micro_batches=1)
        torch.distributed.broadcast = refuse
        engine, _ = build_engine(configuration.parse(values), VOCABULARY, world, sizes)
        torch.distributed.broadcast = broadcast
        count = sum(drawn)
        masters = {(s.name, s.start): s.view_of(s.holder).clone().numpy() for s in engine.param_shards}
        forward = {name: weight.numpy() for name, weight in gloo_ranks.whole_weights(engine).items()}
        losses, shares = [], []
        engine.on_progress = shares.append
        engine.fill(InitialWeights(build_objective(configuration.parse(values), VOCABULARY), values["seed"]).read)
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        for _ in range(2):
            result = engine.train_step([rows(world.rank, world.size)], {"loss": 64}, 0.01, lambda: None)
            losses.append(result.losses["loss"][0])
        found.append({"masters": masters, "forward": forward, "drawn": count, "losses": losses})
    return found


@pytest.fixture(scope="module", params=[1, 2])
def begun(request) -> list[list[dict[str, Any]]]:
    """By case, then by rank, what ``begin`` returns."""
    ranks = gloo_ranks.run(request.param, begin, [composed(*case) for case in CASES], timeout=200)
    return [list(case) for case in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_weights, "BLOCK", BLOCK)
        objective = build_objective(configuration.parse(composed(0, "fp32", ())), VOCABULARY)
    return {name: parameter.detach() for name, parameter in objective.named_parameters()}


def test_masters_are_the_fp32_draw_at_every_stage_and_world(begun, expected):
    for (stage, precision, keys), ranks in zip(CASES, begun, strict=True):
        covered = dict.fromkeys(expected, 0)
        for rank in ranks:
            for (name, start), values in rank["masters"].items():
                right = expected[name].flatten()[start : start + len(values)]
                assert torch.equal(torch.from_numpy(values), right), (stage, precision, keys, name)
                covered[name] += len(values)
        assert all(count >= expected[name].numel() for name, count in covered.items())
        for name, weight in ranks[0]["forward"].items():
            right = expected[name] if precision == "fp32" else expected[name].bfloat16().float()
            assert torch.equal(torch.from_numpy(weight), right), (stage, precision, keys, name)


def test_each_rank_draws_its_share_where_masters_are_sharded(begun, expected):
    size = sum(weight.numel() for weight in expected.values())
    for (stage, _, keys), ranks in zip(CASES, begun, strict=True):
        if stage > 0 and not keys:
            assert sum(rank["drawn"] for rank in ranks) == size
            assert max(rank["drawn"] for rank in ranks) <= size / len(ranks) + len(expected)


def plain_losses(keys: tuple[str, ...]) -> list[float]:
    """The losses of the same two steps in plain torch."""
    from train.optim.factory import build_optimizer, parameter_groups
    from train.pretrained.init_from import freeze_parameters

    config, losses = configuration.parse(composed(0, "fp32", keys)), []
    objective = build_objective(config, VOCABULARY)
    freeze_parameters(objective, config.init.freeze)
    optimizer = build_optimizer(config.optimizer, parameter_groups(objective, config.optimizer.weight_decay))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(2):
        optimizer.zero_grad()
        total, count = objective(rows(0, 1))["loss"]
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.optimizer.clip)
        optimizer.step()
        losses.append(float(total.detach()))
    return losses


def test_first_losses_equal_plain_torch_at_every_stage_and_world(begun):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_weights, "BLOCK", BLOCK)
        expected = {keys: plain_losses(keys) for keys in ((), (FROZEN,))}
    for (stage, precision, keys), ranks in zip(CASES, begun, strict=True):
        if precision == "fp32":
            by_rank = [rank["losses"] for rank in ranks]
            losses = [sum(step) for step in zip(*by_rank, strict=True)]
            assert losses == pytest.approx(expected[keys], rel=1e-6), (stage, keys)


def train_without_drawing(world, emit, config: dict[str, Any], corpus: str) -> str:
    """Train as ``gloo_ranks.train`` does, and fail where a weight is drawn."""
    from train.models.initial_weights import InitialWeights

    def refuse(*arguments: Any) -> torch.Tensor:
        raise AssertionError("a weight was drawn that is then overwritten")

    InitialWeights.read = refuse
    return gloo_ranks.train(world, emit, config, corpus)


@pytest.mark.parametrize(("stage", "workers"), [(0, 1), (3, 2)])
def test_nothing_is_drawn_that_a_checkpoint_or_init_from_fills(corpus: Path, tmp_path: Path, stage, workers):
    keys = (f"zero={stage}", f"cluster.workers={workers}", "precision=fp32")
    config = gloo_ranks.on_corpus(corpus, tmp_path / "run", *keys)
    gloo_ranks.train_world(config, corpus, {"event": "step", "step": 3})
    again = gloo_ranks.run(workers, train_without_drawing, configuration.to_dict(config), str(corpus))
    assert again == ["done"] * workers
    tuned = gloo_ranks.on_corpus(corpus, tmp_path / "tuned", *keys, f"init.from={config.run.dir}")
    assert gloo_ranks.run(workers, train_without_drawing, configuration.to_dict(tuned), str(corpus)) == again
