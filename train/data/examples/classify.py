"""Rows for classification and regression: one document each, with its class or its score."""

from __future__ import annotations

import math

import numpy as np
import torch

from train.batch import IGNORE
from train.config.keys import objectives
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import BuiltRows, Columns, read_labelled
from train.data.sampling.epoch_order import DocSpans
from train.data.tokenizer import Tokenizer
from train.errors import UserError


class ClassifyExamples:
    """Builds rows [CLS] text [SEP] with one target each.

    A tokenizer without [CLS] and [SEP] uses its end-of-text token for both.
    """

    chunk_tokens = 1 << 16

    def __init__(self, seq_len: int, objective: objectives.Classify, tokenizer: Tokenizer) -> None:
        self.row_tokens = self.seq_len = seq_len
        self.objective = objective
        self.classes = {name: number for number, name in enumerate(objective.classes)}
        self.tokenizer = tokenizer
        self.first, self.last = (tokenizer.find(name, tokenizer.eot) for name in ("[CLS]", "[SEP]"))
        self.columns: Columns = dict.fromkeys(("tokens", "positions"), ((seq_len,), torch.int64))
        self.columns |= {
            "segments": ((seq_len,), torch.int32),
            "targets": ((), torch.int64 if self.classes else torch.float32),
        }

    def read_rows(self, split: CorpusSplit, spans: DocSpans, epoch: int) -> BuiltRows:
        """Implements ``ExampleBuilder.read_rows``. Raises UserError for a label that is no class, or no number."""
        documents = list(read_labelled(split, spans, self.row_tokens, self.tokenizer.eot))
        shape = len(documents), self.seq_len
        tokens, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int32)
        targets = np.full(len(documents), IGNORE) if self.classes else np.full(len(documents), math.nan, np.float32)
        for row, (sample, text, label_ids) in enumerate(documents):
            if len(label_ids):
                whole = [self.first, *text[: self.seq_len - 2], self.last]
                tokens[row, : len(whole)], segments[row, : len(whole)] = whole, 1
                label = self.tokenizer.decode(label_ids.tolist()).strip()
                if problem := self.objective.label_problem(label):
                    begins = self.tokenizer.decode(text[:32].tolist())
                    raise UserError(f"{split.source(sample)}: of the document that begins {begins!r}, {problem}")
                targets[row] = self.classes[label] if self.classes else float(label)
        positions = np.broadcast_to(np.arange(self.seq_len), tokens.shape)
        return BuiltRows({"tokens": tokens, "positions": positions, "segments": segments, "targets": targets})
