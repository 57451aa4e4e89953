"""Sequence to sequence: a target is written, token after token, by who has read a source (Sutskever et al. 2014; T5)."""

from __future__ import annotations

from typing import Any

from train.config import schema
from train.data.examples.seq2seq import row_lengths
from train.models import build_backbone
from train.objectives.generative import GenerativeObjective
from train.objectives.lm_head import LMHead


class Seq2seqLM(GenerativeObjective):
    """An encoder-decoder with a head over the vocabulary; the loss is of the target's tokens (B, U)."""

    whole_text = False

    def __init__(self, backbone: Any, head: LMHead, vocab_size: int, isolate: bool, targets: float) -> None:
        """``targets`` is how many tokens of the target there are to one of the source."""
        super().__init__(backbone, head, vocab_size, isolate)
        self.targets = targets

    @property
    def continues(self) -> bool:
        """A target answers its source."""
        return False

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of a training step per token of the source: see ``EncDec.flops_per_token``."""
        rows, width = self.backbone.embed.num_embeddings, self.backbone.embed.embedding_dim
        return self.backbone.flops_per_token(seq_len, causal, self.targets) + 6 * rows * width * self.targets


def build_seq2seq(config: schema.Config, vocab_size: int) -> Seq2seqLM:
    """The sequence-to-sequence objective of a run for a tokenizer of ``vocab_size`` tokens."""
    objective = config.objective
    assert isinstance(objective, schema.Seq2seq)
    backbone = build_backbone(config.model, vocab_size)
    head = LMHead(
        backbone.embed, config.model.tied, objective, backbone.head_scale, config.model.deviation(config.model.width)
    )
    _, target = row_lengths(config.batch.seq_len, objective)
    return Seq2seqLM(backbone, head, vocab_size, config.data.isolate, target / config.batch.seq_len)
