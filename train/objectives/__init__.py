"""What is trained: a backbone, its head and its loss, one file an objective."""

from __future__ import annotations

from torch import nn

from train import schema
from train.errors import UserError
from train.models.layers import init_weights
from train.objectives.causal import build_causal

OBJECTIVES = {"causal": build_causal}
MEANINGFUL = {"causal": ("decoder",)}
"""The model families that an objective makes sense for."""


def build_objective(config: schema.Config, vocab_size: int) -> nn.Module:
    """The module that is trained, its weights drawn from ``config.seed``; raises UserError where its parts do not fit.

    ``vocab_size`` is the tokenizer's. Under ``torch.device("meta")`` nothing is allocated and nothing drawn.
    """
    family, name = config.model.family, config.objective.name
    if family not in MEANINGFUL[name]:
        pairs = "; ".join(f"{objective} with {', '.join(families)}" for objective, families in MEANINGFUL.items())
        raise UserError(f"objective={name} makes no sense for a model of family {family}. What does: {pairs}")
    objective = OBJECTIVES[name](config, vocab_size)
    init_weights(objective, config.seed)
    return objective
