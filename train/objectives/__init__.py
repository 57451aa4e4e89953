"""Objectives: a backbone with its head and loss, the module that is trained. One file per objective.

causal      next-token prediction
masked      masked language modelling and next-sentence prediction
seq2seq     encoder-decoder: a target given a source
classify    classes or scores of documents
by_source   training losses of the sources of a mixture
generative  shared base of the objectives that generate text
lm_head     output matrix over the vocabulary and its loss
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.config import schema
from train.config.schema import source_names
from train.config.validate import family_mismatch
from train.errors import UserError
from train.models.initial_weights import init_weights
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
    """Build the module to train, with weights drawn from ``config.seed``. Raises UserError where its parts do not fit.

    ``vocab_size`` is the tokenizer's. Under ``torch.device("meta")`` nothing is allocated or drawn.
    """
    if problems := [*family_mismatch(config), *config.model.problems(config.batch.seq_len)]:
        raise UserError("; ".join(problems))
    objective: Any = OBJECTIVES[config.objective.name](config, vocab_size)
    objective.sources = source_names(config)
    init_weights(objective, config.seed)
    return objective


def describe_objective(config: schema.Config, vocab_size: int) -> nn.Module:
    """The module of ``build_objective`` on ``meta``: its layers, names and shapes, without memory or weights."""
    with torch.device("meta"):
        return build_objective(config, vocab_size)
