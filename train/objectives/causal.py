"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from train.config import schema
from train.models import build_backbone
from train.models.backbone import CarryingBackbone
from train.objectives.generative import GenerativeObjective
from train.objectives.lm_head import LMHead


class CausalLM(GenerativeObjective):
    """Next-token prediction with a decoder or recurrent backbone."""

    whole_text = True
    """Every token of the text is predicted, so bits per byte are defined."""

    @property
    def continues(self) -> bool:
        """Always true: generated text continues its prompt."""
        return True

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of a training step per token of rows of ``seq_len``, head included: see ``Decoder.flops_per_token``."""
        rows, width = self.backbone.embed.num_embeddings, self.backbone.embed.embedding_dim
        return self.backbone.flops_per_token(seq_len, causal) + 6 * rows * width


def build_causal(config: schema.Config, vocab_size: int) -> CausalLM:
    """Build the causal objective of a run for a tokenizer of ``vocab_size`` tokens."""
    model = config.model
    backbone: CarryingBackbone = build_backbone(model, vocab_size)
    if model.carries_state:
        backbone.enable_carry(config.batch.global_)
    assert isinstance(config.objective, schema.Causal)
    head = LMHead(backbone.embed, model.tied, config.objective)
    return CausalLM(backbone, head, vocab_size, config.data.isolate)
