"""Backbones, one file a family."""

from __future__ import annotations

from train import schema
from train.errors import UserError
from train.models.decoder import Decoder

BACKBONES = {"decoder": Decoder}


def build_backbone(model: schema.Model, vocab_size: int) -> Decoder:
    """The backbone of ``model`` for a tokenizer of ``vocab_size`` tokens. Raises UserError where they do not fit."""
    return BACKBONES[model.family](model, padded_vocab(model, vocab_size))


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
