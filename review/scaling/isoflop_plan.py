"""The runs of a scaling study: which sizes, at which budgets of compute, for how many steps.

Every budget is spent on several sizes, each trained for as long as the budget lasts (IsoFLOP; Hoffmann et al. 2022, approach 2),
with a learning-rate schedule that ends with it. The largest size is no part of the fit: it is the one that is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.config import load as configuration
from train.config.schema import Config
from train.objectives import build_objective


@dataclass(frozen=True)
class ModelSize:
    """A decoder of the Llama kind."""

    width: int
    layers: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class IsoFlopPlan:
    """Sizes, smallest first, and FLOPs; the last size alone gets the last budget."""

    sizes: tuple[ModelSize, ...]
    budgets: tuple[float, ...]
    lr: float
    """Of a model that is 64 wide; others get lr * sqrt(64 / width)."""
    vocab_size: int
    """Of the tokenizer, so that cost is known before there is a corpus."""
    overrides: tuple[str, ...]


TINY = IsoFlopPlan(
    sizes=(
        ModelSize(24, 2, 2, 64),
        ModelSize(32, 2, 2, 88),
        ModelSize(48, 2, 4, 128),
        ModelSize(64, 3, 4, 176),
        ModelSize(96, 3, 4, 256),
    ),
    budgets=(2e11, 6e11, 1.8e12, 5.4e12),
    lr=4e-3,
    vocab_size=257,
    overrides=("experiment=scaling",),
)
"""Minutes on two cores: 22 thousand to 363 thousand parameters, bytes of the embedded corpus."""
CLUSTER = IsoFlopPlan(
    sizes=(
        ModelSize(512, 8, 8, 1408),
        ModelSize(768, 12, 12, 2048),
        ModelSize(1024, 16, 16, 2816),
        ModelSize(1536, 20, 24, 4096),
        ModelSize(2048, 24, 16, 5632),
    ),
    budgets=(1e18, 4e18, 1.6e19, 6.4e19),
    lr=6e-3,
    vocab_size=32000,
    overrides=(
        "experiment=scaling",
        "data=text",
        "data.tokenizer.kind=bpe",
        "data.tokenizer.vocab_size=32000",
        "model.max_len=2048",
        "batch.seq_len=2048",
        "batch.global=128",
        "precision=bf16",
        "zero=1",
        "save_every=500",
    ),
)
"""41 million to 1.3 billion parameters; give data.paths and cluster.workers."""
PLANS = {"tiny": TINY, "cluster": CLUSTER}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    name: str
    """Its width and its budget."""
    compute: float
    """FLOPs."""
    point: tuple[str, ...]
    """What sets it apart from the others, as ``key=value``."""


def planned_runs(plan: IsoFlopPlan, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Every size at every budget but the last, then the last size at the last one. The longest come first: where several run at
    once, none is left to run alone at the end. ``overrides`` are for all of them.

    Left out are runs of less than half a token or more than 170 tokens a parameter: they are far from any optimum, and the
    longest ones would cost the most steps.
    """
    found = []
    for size in plan.sizes:
        lr = plan.lr * (64 / size.width) ** 0.5
        model = [f"model.{key}={value}" for key, value in vars(size).items()] + [f"optimizer.lr={lr:.2g}"]
        config = configuration.load([*plan.overrides, *overrides, *model, "steps=1"])
        params, flops_per_token = model_cost(config, plan.vocab_size)
        per_step = config.batch.global_ * config.batch.seq_len
        largest = size is plan.sizes[-1]
        for budget in plan.budgets[2:] if largest else plan.budgets[:-1]:
            steps = round(budget / flops_per_token / per_step)
            if 0.5 <= steps * per_step / params <= 170:
                name = f"w{size.width}-{budget:.2g}".replace("+", "")
                found.append(PlannedRun(name, budget, (*model, f"steps={steps}")))
    return sorted(found, key=lambda trial: -trial.compute)


def model_cost(config: Config, vocab_size: int) -> tuple[int, float]:
    """(parameters, FLOPs per token) of the model of a configuration, without making its weights."""
    with torch.device("meta"):
        objective: Any = build_objective(config, vocab_size)
    return sum(p.numel() for p in objective.parameters()), objective.flops_per_token(config.batch.seq_len)
