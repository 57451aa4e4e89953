"""How stored documents become the rows of a Batch, one file an objective."""

from __future__ import annotations

from typing import Any

from train.config import schema
from train.data.examples.causal import Causal
from train.data.examples.classify import Classify
from train.data.examples.example_builder import Examples
from train.data.examples.masked import Masked
from train.data.examples.seq2seq import Seq2seq
from train.data.tokenizer import Tokenizer


def build_examples(config: schema.Config, tokenizer: Tokenizer) -> Examples:
    """How the rows of a run are made."""
    seq_len, isolate, objective = config.batch.seq_len, config.data.isolate, config.objective
    if isinstance(objective, schema.Causal):
        return Causal(seq_len, isolate, getattr(config.model, "carry", False))
    if isinstance(objective, schema.Classify):
        return Classify(seq_len, objective, tokenizer)
    kinds: dict[str, Any] = {"masked": Masked, "seq2seq": Seq2seq}
    return kinds[objective.name](seq_len, isolate, objective, tokenizer, config.seed)
