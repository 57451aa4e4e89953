"""Rows for classes and scores: one document each, and what is to be said of it."""

from __future__ import annotations

import math

import numpy as np
import torch

from train.batch import IGNORE
from train.config.keys import objectives
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import BuiltRows, Columns
from train.data.examples.labelled import texts_of
from train.data.sampling.epoch_order import DocSpans
from train.data.tokenizer import Tokenizer
from train.errors import UserError


class ClassifyExamples:
    """[CLS] text [SEP], or the same with the token that ends documents where the model has neither; and its label."""

    chunk = 1 << 16

    def __init__(self, seq_len: int, objective: objectives.Classify, tokenizer: Tokenizer) -> None:
        self.places = self.seq_len = seq_len
        self.objective = objective
        self.classes = {name: number for number, name in enumerate(objective.classes)}
        self.tokenizer = tokenizer
        self.first, self.last = (tokenizer.find(name, tokenizer.eot) for name in ("[CLS]", "[SEP]"))
        self.layout: Columns = dict.fromkeys(("tokens", "positions"), ((seq_len,), torch.int64))
        self.layout |= {
            "segments": ((seq_len,), torch.int32),
            "targets": ((), torch.int64 if self.classes else torch.float32),
        }

    def read(self, shards: CorpusSplit, pieces: DocSpans, epoch: int) -> BuiltRows:
        """As ``Examples.read``. Raises UserError for a label that is none of the classes, or no number."""
        texts = list(texts_of(shards, pieces, self.places, self.tokenizer.eot))
        tokens, segments = (
            np.zeros((len(texts), self.seq_len), np.int64),
            np.zeros((len(texts), self.seq_len), np.int32),
        )
        targets = np.full(len(texts), IGNORE) if self.classes else np.full(len(texts), math.nan, np.float32)
        for row, (sample, text, label) in enumerate(texts):
            if len(label):
                whole = [self.first, *text[: self.seq_len - 2], self.last]
                tokens[row, : len(whole)], segments[row, : len(whole)] = whole, 1
                said = self.tokenizer.decode(label.tolist()).strip()
                if wrong := self.objective.label_problem(said):
                    begins = self.tokenizer.decode(text[:32].tolist())
                    raise UserError(f"{shards.source(sample)}: of the document that begins {begins!r}, {wrong}")
                targets[row] = self.classes[said] if self.classes else float(said)
        positions = np.broadcast_to(np.arange(self.seq_len), tokens.shape)
        return BuiltRows({"tokens": tokens, "positions": positions, "segments": segments, "targets": targets})
