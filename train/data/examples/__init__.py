"""How stored documents become the rows of a Batch, one file an objective."""

from __future__ import annotations

from typing import Any

from train.config import schema
from train.data.examples.causal import CausalExamples
from train.data.examples.classify import ClassifyExamples
from train.data.examples.example_builder import ExampleBuilder
from train.data.examples.masked import MaskedExamples
from train.data.examples.seq2seq import Seq2seqExamples
from train.data.tokenizer import Tokenizer


def build_examples(config: schema.Config, tokenizer: Tokenizer) -> ExampleBuilder:
    """How the rows of a run are made."""
    seq_len, isolate, objective = config.batch.seq_len, config.data.isolate, config.objective
    if isinstance(objective, schema.Causal):
        return CausalExamples(seq_len, isolate, config.model.carries_state)
    if isinstance(objective, schema.Classify):
        return ClassifyExamples(seq_len, objective, tokenizer)
    kinds: dict[str, Any] = {"masked": MaskedExamples, "seq2seq": Seq2seqExamples}
    return kinds[objective.name](seq_len, isolate, objective, tokenizer, config.seed)
