"""Backbones, one file a family. A new one is its file here, its keys in ``train/sections/`` and its name in ``schema.Model``.

File and class have the names that they have there.

A backbone is a module over ``embed`` (an Embedding) with

    forward(batch, isolate)       hidden states (B, T, D), to be read by a head; no token sees another segment with ``isolate``
    pooled(batch, isolate)        one vector a row, (B, D)
    flops_per_token(seq_len, causal), max_len

and, where it can write, ``prefill`` and ``decode``: see ``train.generation.generate``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from train.config import schema
from train.errors import UserError


def build_backbone(model: schema.Model, vocab_size: int) -> Any:
    """The backbone of ``model`` for a tokenizer of ``vocab_size`` tokens. Raises UserError where they do not fit."""
    if problems := model.problems(0):
        raise UserError("; ".join(problems))
    backbone = getattr(import_module(f"train.models.{model.family}"), type(model).__name__)
    return backbone(model, padded_vocab(model, vocab_size))


def padded_vocab(model: schema.Model, vocab_size: int) -> int:
    """Rows of the embedding: ``model.vocab_size``, or the tokenizer's rounded up to a multiple of 64."""
    if model.vocab_size is None:
        return -(-vocab_size // 64) * 64
    if model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's {vocab_size} tokens; "
            f"set model.vocab_size={-(-vocab_size // 64) * 64}, or null to follow the tokenizer"
        )
    return model.vocab_size
