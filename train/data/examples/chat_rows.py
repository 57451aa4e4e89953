"""Rows for training on conversations: each stored row of packed conversations as it is, with its mask."""

from __future__ import annotations

import numpy as np
import torch

from train.batch import IGNORE
from train.data.chat.packed_rows import DTYPE, read_marks
from train.data.corpus.shards import CorpusSplit
from train.data.examples.example_builder import BuiltRows, Columns, positions_in_segments
from train.data.sampling.epoch_order import DocSpans
from train.errors import UserError


class ChatExamples:
    """Builds rows of ``seq_len`` tokens: the next one of the conversation is a target where it is trained."""

    chunk_tokens = 1 << 18

    def __init__(self, seq_len: int) -> None:
        self.row_tokens = seq_len
        self.columns: Columns = dict.fromkeys(("tokens", "targets", "positions"), ((seq_len,), torch.int64))
        self.columns["segments"] = (seq_len,), torch.int32

    def read_rows(self, split: CorpusSplit, spans: DocSpans, epoch: int) -> BuiltRows:
        """Implements ``ExampleBuilder.read_rows``; the epoch has no influence. Raises UserError for other corpora."""
        if split.dtype != np.dtype(DTYPE):
            raise UserError(f"{split.folder} holds no conversations: prepare them with data=chat")
        begins = np.cumsum(spans.length) - spans.length
        samples = spans.sample[begins % self.row_tokens == 0].tolist()
        shape = len(samples), self.row_tokens
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE)
        segments = np.zeros(shape, np.int32)
        for row, sample in enumerate(samples):
            if sample < 0:
                continue
            ids, trained, conversation = read_marks(split.stored(sample))
            inner = np.flatnonzero(conversation[1:] == conversation[:-1])  # inputs: all but the last of each
            if len(inner) > self.row_tokens:
                raise UserError(
                    f"{split.folder} has rows of more than batch.seq_len={self.row_tokens} tokens: prepare it again, "
                    "with data.row_tokens of that size"
                )
            part = slice(len(inner))
            tokens[row, part] = ids[inner]
            targets[row, part] = np.where(trained[inner + 1], ids[inner + 1], IGNORE)
            segments[row, part] = conversation[inner]
        arrays = {"tokens": tokens, "targets": targets, "segments": segments}
        return BuiltRows(
            {**arrays, "positions": np.where(segments > 0, positions_in_segments(segments.astype(np.int64)), 0)}
        )
