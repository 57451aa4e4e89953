"""Plans the runs of a scaling study: model sizes, compute budgets, and steps.

Every budget is spent on several sizes, each trained until the budget is used up (IsoFLOP; Hoffmann et al. 2022,
approach 2), with a learning-rate schedule that ends there. The largest size is not part of the fit: it is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.config import load as configuration
from train.config.schema import Config
from train.objectives import describe_objective


@dataclass(frozen=True)
class ModelSize:
    """Shape of a Llama-like decoder."""

    width: int
    layers: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class IsoFlopPlan:
    """Model sizes, smallest first, and budgets in FLOPs; only the last size gets the last budget."""

    sizes: tuple[ModelSize, ...]
    budgets: tuple[float, ...]
    lr: float
    """Learning rate at width 64; other widths get lr * sqrt(64 / width)."""
    vocab_size: int
    """Of the tokenizer, so that the cost is known before there is a corpus."""
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
"""Some minutes on two cores: 22 thousand to 363 thousand parameters, bytes of the embedded corpus."""
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
    """One run of a scaling study: a size at a budget."""

    name: str
    """Of its width and its budget."""
    compute: float
    """Budget in FLOPs."""
    point: tuple[str, ...]
    """Its own overrides, as ``key=value``."""


def planned_runs(plan: IsoFlopPlan, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Every size at every budget but the last, and the largest size at the last two; ``overrides`` apply to all.

    The longest come first, so that in parallel no long run is left alone at the end. Runs of less than half a token or
    more than 170 tokens per parameter are left out: they are far from any optimum, and the longest would cost the most
    steps.
    """
    runs = []
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
                runs.append(PlannedRun(name, budget, (*model, f"steps={steps}")))
    return sorted(runs, key=lambda run: -run.compute)


def model_cost(config: Config, vocab_size: int) -> tuple[int, float]:
    """(parameters, FLOPs per token) of a configuration's model, built on the meta device without weights."""
    objective: Any = describe_objective(config, vocab_size)
    return sum(p.numel() for p in objective.parameters()), objective.flops_per_token(config.batch.seq_len)
