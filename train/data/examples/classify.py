"""Rows for classes and scores: one document each, and what is to be said of it."""

from __future__ import annotations

import math

import numpy as np
import torch

from train.batch import IGNORE
from train.data.examples.labelled import texts_of
from train.data.examples.rows import Columns, Ready
from train.data.order import Ints, Pieces
from train.data.shards import Shards
from train.data.tokenizer import Tokenizer
from train.errors import UserError


class Classify:
    """[CLS] text [SEP], or the same with the token that ends documents where the model has neither; and its label."""

    chunk = 1 << 16

    def __init__(self, seq_len: int, classes: list[str], tokenizer: Tokenizer) -> None:
        self.places = self.seq_len = seq_len
        self.classes = {name: number for number, name in enumerate(classes)}
        self.tokenizer = tokenizer
        self.first, self.last = (tokenizer.find(name, tokenizer.eot) for name in ("[CLS]", "[SEP]"))
        self.layout: Columns = dict.fromkeys(("tokens", "positions"), ((seq_len,), torch.int64))
        self.layout |= {"segments": ((seq_len,), torch.int32), "targets": ((), torch.int64 if classes else torch.float32)}

    def read(self, shards: Shards, pieces: Pieces, epoch: int) -> Ready:
        """As ``Examples.read``. Raises UserError for a label that is none of the classes, or no number."""
        texts = list(texts_of(shards, pieces, self.places, self.tokenizer.eot))
        tokens, segments = np.zeros((len(texts), self.seq_len), np.int64), np.zeros((len(texts), self.seq_len), np.int32)
        targets = np.full(len(texts), IGNORE) if self.classes else np.full(len(texts), math.nan, np.float32)
        for row, (text, label) in enumerate(texts):
            if len(label):
                whole = [self.first, *text[: self.seq_len - 2], self.last]
                tokens[row, : len(whole)], segments[row, : len(whole)] = whole, 1
                targets[row] = self._target(label)
        positions = np.broadcast_to(np.arange(self.seq_len), tokens.shape)
        return Ready({"tokens": tokens, "positions": positions, "segments": segments, "targets": targets})

    def _target(self, label: Ints) -> float:
        text = self.tokenizer.decode(label.tolist()).strip()
        if self.classes:
            if text not in self.classes:
                known = ", ".join(self.classes)
                raise UserError(f"the label {text!r} is none of objective.classes ({known}): name it there, or mend the data")
            return self.classes[text]
        try:
            return float(text)
        except ValueError:
            raise UserError(
                f"the label {text!r} is no number: name the classes in objective.classes=[...], or mend the data"
            ) from None
