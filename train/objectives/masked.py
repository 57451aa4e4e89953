"""Masked language modelling and next-sentence prediction (Devlin et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from train.batch import IGNORE, Batch, Losses, trained_mask
from train.config import schema
from train.models import build_backbone
from train.models.backbone import BidirectionalBackbone
from train.models.layers import ActivatedLinear, Linear, Norm


class MaskedHead(nn.Module):
    """BERT's head: a linear layer, activation and norm, then the token embedding's matrix with a bias."""

    def __init__(self, backbone: BidirectionalBackbone) -> None:
        super().__init__()
        model, embed = backbone.model, backbone.embed
        self.transform = ActivatedLinear(model, model.width)
        self.norm = Norm(model)
        self.init_std = embed.init_std
        self.weight = embed.weight if model.tied else nn.Parameter(torch.empty_like(embed.weight))
        self.bias = nn.Parameter(torch.zeros(len(embed.weight)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden (..., D) -> logits (..., V)."""
        return F.linear(self.norm(self.transform(hidden))[0], self.weight, self.bias)


class MaskedLM(nn.Module):
    """A bidirectional backbone with a head for masked tokens and, for sentence pairs, one for next-sentence prediction.

    ``forward`` gives {"loss": masked tokens, "next_loss": pairs}, and in evaluation both accuracies.
    """

    whole_text = False

    def __init__(
        self,
        backbone: BidirectionalBackbone,
        head: nn.ModuleDict,
        vocab_size: int,
        objective: schema.Masked,
        isolate: bool,
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.vocab_size, self.isolate = vocab_size, isolate
        self.regularisers = {"label_smoothing": objective.label_smoothing, "z_loss": objective.z_loss}
        self.next_sentence = objective.next_sentence

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch, in nats. Logits are computed for masked tokens only."""
        hidden = self.backbone(batch, self.isolate)
        chosen = trained_mask(batch["targets"])
        found = self._measured("", self.head["tokens"](hidden[chosen]), batch["targets"][chosen])
        if self.next_sentence:
            found |= self._measured("next_", self.head["next"](self.backbone.pooler(hidden)), batch["next_targets"])
        return found

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, T, vocab_size) of every token."""
        return self.head["tokens"](self.backbone(batch, self.isolate))[..., : self.vocab_size]

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of a training step per token of rows of ``seq_len``, with logits counted for every token, as BERT makes
        them.
        """
        rows, width = self.backbone.embed.num_embeddings, self.backbone.embed.embedding_dim
        return self.backbone.flops_per_token(seq_len, causal) + 6 * (rows * width + width**2)

    def _measured(self, prefix: str, logits: Tensor, targets: Tensor) -> Losses:
        more = self.regularisers if self.training and not prefix else {}
        found = {f"{prefix}loss": kernels.cross_entropy(logits, targets, ignore_index=IGNORE, **more)}
        if not self.training:
            right = (logits.argmax(-1) == targets) & trained_mask(targets)
            found[f"{prefix}accuracy"] = right.sum(), trained_mask(targets).sum()
        return found


def build_masked(config: schema.Config, vocab_size: int) -> MaskedLM:
    """Build the masked objective of a run for a tokenizer of ``vocab_size`` tokens."""
    objective = config.objective
    assert isinstance(objective, schema.Masked)
    backbone: BidirectionalBackbone = build_backbone(config.model, vocab_size)
    heads: dict[str, nn.Module] = {"tokens": MaskedHead(backbone)}
    if objective.next_sentence:
        heads["next"] = Linear(config.model.width, 2, True, config.model.deviation(config.model.width))
    else:
        backbone.pooler = None  # nothing would train it
    return MaskedLM(backbone, nn.ModuleDict(heads), vocab_size, objective, config.data.isolate)
