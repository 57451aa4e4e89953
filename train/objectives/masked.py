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
from train.objectives.by_source import losses_by_source


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
    sources: tuple[str, ...] = ()

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
        masked = trained_mask(batch["targets"])
        logits, targets = self.head["tokens"](hidden[masked]), batch["targets"][masked]
        losses = self._losses("", logits, targets)
        if "source" in batch:
            of_target = torch.zeros_like(masked, dtype=torch.float32)
            of_target[masked] = F.cross_entropy(logits.detach().float(), targets, reduction="none")
            losses |= losses_by_source(batch, of_target, self.sources)
        if self.next_sentence:
            losses |= self._losses("next_", self.head["next"](self.backbone.pooler(hidden)), batch["next_targets"])
        return losses

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, T, vocab_size) of every token."""
        return self.head["tokens"](self.backbone(batch, self.isolate))[..., : self.vocab_size]

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of a training step per token of rows of ``seq_len``; logits are counted for every token, as in BERT."""
        rows, width = self.backbone.embed.num_embeddings, self.backbone.embed.embedding_dim
        return self.backbone.flops_per_token(seq_len, causal) + 6 * (rows * width + width**2)

    def _losses(self, prefix: str, logits: Tensor, targets: Tensor) -> Losses:
        regularisers = self.regularisers if self.training and not prefix else {}
        losses = {f"{prefix}loss": kernels.cross_entropy(logits, targets, ignore_index=IGNORE, **regularisers)}
        if not self.training:
            correct = (logits.argmax(-1) == targets) & trained_mask(targets)
            losses[f"{prefix}accuracy"] = correct.sum(), trained_mask(targets).sum()
        return losses


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
