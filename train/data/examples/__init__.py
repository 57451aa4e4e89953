"""Rows of a Batch from stored documents, one module an objective.

example_builder   the interface of all builders, and what most of them share
causal            next-token prediction
chat_rows         next-token prediction of what the assistant says in conversations
masked            BERT: masked tokens and pairs of texts
seq2seq           T5: span corruption, or given pairs of texts
classify          a document and its label
"""

from __future__ import annotations

from typing import Any

from train.config import schema
from train.data.examples.causal import CausalExamples
from train.data.examples.chat_rows import ChatExamples
from train.data.examples.classify import ClassifyExamples
from train.data.examples.example_builder import ExampleBuilder
from train.data.examples.masked import MaskedExamples
from train.data.examples.seq2seq import Seq2seqExamples
from train.data.tokenizer import Tokenizer


def build_examples(config: schema.Config, tokenizer: Tokenizer) -> ExampleBuilder:
    """The builder of the rows that a configuration's objective trains on."""
    seq_len, isolate, objective = config.batch.seq_len, config.data.isolate, config.objective
    if config.data.is_chat:
        return ChatExamples(seq_len)
    if isinstance(objective, schema.Causal):
        return CausalExamples(seq_len, isolate, config.model.carries_state)
    if isinstance(objective, schema.Classify):
        return ClassifyExamples(seq_len, objective, tokenizer)
    kinds: dict[str, Any] = {"masked": MaskedExamples, "seq2seq": Seq2seqExamples}
    return kinds[objective.name](seq_len, isolate, objective, tokenizer, config.seed)
