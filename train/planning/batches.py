"""A step's micro-batches with full rows, in the shapes that the data builders give, without a corpus."""

from __future__ import annotations

import torch

from train.batch import IGNORE, Batch
from train.config import schema
from train.data.examples.seq2seq import row_lengths

FINE = 10**6
"""Parts of one, in which a rate is rounded."""


def full_batch(config: schema.Config, rows: int) -> Batch:
    """A batch of ``rows`` rows without padding, each of one document; masks are at their rate, evenly."""
    length, objective = config.batch.seq_len, config.objective
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    batch = {"tokens": tokens, "positions": torch.arange(length).repeat(rows, 1)}
    batch["segments"] = torch.ones(rows, length, dtype=torch.int32)
    if isinstance(objective, schema.Causal):
        batch["targets"] = torch.zeros_like(tokens)
        if config.model.carries_state:
            batch["memory"] = torch.arange(1, rows + 1)
    elif isinstance(objective, schema.Masked):
        place = torch.arange(rows * length).view(rows, length)
        rate = round(objective.rate * FINE)  # whole numbers alone: a dry run computes no others
        chosen = place * rate // FINE != (place + 1) * rate // FINE
        batch["targets"] = torch.where(chosen, 0, IGNORE)
        if objective.next_sentence:
            batch |= {"types": torch.zeros_like(tokens), "next_targets": torch.zeros(rows, dtype=torch.int64)}
    elif isinstance(objective, schema.Seq2seq):
        targets = row_lengths(length, objective)[1]
        for name in ("target_tokens", "targets"):
            batch[name] = torch.zeros(rows, targets, dtype=torch.int64)
        batch["target_segments"] = torch.ones(rows, targets, dtype=torch.int32)
    else:
        dtype = torch.int64 if objective.classes else torch.float32
        batch["targets"] = torch.zeros(rows, dtype=dtype)
    return batch
