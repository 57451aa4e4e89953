"""Sequence to sequence: an encoder reads the source, a decoder predicts the target.

Sutskever et al. 2014; T5: Raffel et al. 2020.
"""

from __future__ import annotations

from train.config import schema
from train.data.examples.seq2seq import row_lengths
from train.models import build_backbone
from train.models.backbone import EncDecBackbone
from train.objectives.generative import GenerativeObjective
from train.objectives.lm_head import LMHead


class Seq2seqLM(GenerativeObjective):
    """An encoder-decoder with a head over the vocabulary; the loss is that of the target's tokens (B, U)."""

    whole_text = False

    def __init__(self, backbone: EncDecBackbone, head: LMHead, vocab_size: int, isolate: bool, targets: float) -> None:
        """``targets`` is the number of target tokens per source token."""
        super().__init__(backbone, head, vocab_size, isolate)
        self.backbone: EncDecBackbone
        self.targets = targets

    @property
    def continues(self) -> bool:
        """Always false: a target answers its source."""
        return False

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of a training step per source token, head included: see ``EncDec.flops_per_token``."""
        rows, width = self.backbone.embed.num_embeddings, self.backbone.embed.embedding_dim
        return self.backbone.flops_per_token(seq_len, causal, self.targets) + 6 * rows * width * self.targets


def build_seq2seq(config: schema.Config, vocab_size: int) -> Seq2seqLM:
    """Build the seq2seq objective of a run for a tokenizer of ``vocab_size`` tokens."""
    objective = config.objective
    assert isinstance(objective, schema.Seq2seq)
    backbone: EncDecBackbone = build_backbone(config.model, vocab_size)
    head = LMHead(
        backbone.embed, config.model.tied, objective, backbone.head_scale, config.model.deviation(config.model.width)
    )
    _, target = row_lengths(config.batch.seq_len, objective)
    return Seq2seqLM(backbone, head, vocab_size, config.data.isolate, target / config.batch.seq_len)
