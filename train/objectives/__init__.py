"""What is trained: a backbone, its head and its loss, one file an objective."""

from __future__ import annotations

from typing import Any

from torch import nn

from train.config import schema
from train.config.validate import mismatch
from train.errors import UserError
from train.models.layers import init_weights
from train.objectives.causal import build_causal
from train.objectives.classify import build_classify
from train.objectives.masked import build_masked
from train.objectives.seq2seq import build_seq2seq

OBJECTIVES: dict[str, Any] = {
    "causal": build_causal,
    "masked": build_masked,
    "seq2seq": build_seq2seq,
    "classify": build_classify,
}


def build_objective(config: schema.Config, vocab_size: int) -> nn.Module:
    """The module that is trained, its weights drawn from ``config.seed``; raises UserError where its parts do not fit.

    ``vocab_size`` is the tokenizer's. Under ``torch.device("meta")`` nothing is allocated and nothing drawn.
    """
    if problems := [*mismatch(config), *config.model.problems(config.batch.seq_len)]:
        raise UserError("; ".join(problems))
    objective: nn.Module = OBJECTIVES[config.objective.name](config, vocab_size)
    init_weights(objective, config.seed)
    return objective
