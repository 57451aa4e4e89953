"""Backbones, one file per model family; ``backbone`` is their contract.

A new family is its file here, its keys in ``train/config/keys/`` (file and class of the same names) and its name in
``schema.Model``.

backbone        protocols: the methods that objectives use of a family
decoder         GPT-2, Llama
encoder         BERT
encdec          T5, the original Transformer
recurrent       RNN, LSTM, GRU
layers          attention, MLPs, norms and initialisation shared by the families
initial_weights what the parameters of a new model start with
carried_state   hidden states that a recurrent model carries from step to step
generation_api  protocols: the methods that sampler and beam search use of a model
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from train.config import schema
from train.errors import UserError


def build_backbone(model: schema.Model, vocab_size: int) -> Any:
    """Build the backbone of ``model`` for a tokenizer of ``vocab_size`` tokens. Raises UserError if they do not fit."""
    if problems := model.problems(0):
        raise UserError("; ".join(problems))
    backbone = getattr(import_module(f"train.models.{model.family}"), type(model).__name__)
    return backbone(model, padded_vocab(model, vocab_size))


def padded_vocab(model: schema.Model, vocab_size: int) -> int:
    """Rows of the embedding: ``model.vocab_size``, or the tokenizer's size rounded up to a multiple of 64."""
    if model.vocab_size is None:
        return -(-vocab_size // 64) * 64
    if model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's {vocab_size} tokens; "
            f"set model.vocab_size={-(-vocab_size // 64) * 64}, or null to follow the tokenizer"
        )
    return model.vocab_size
