"""Classification and regression of documents: a linear layer over a backbone's pooled rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from train.batch import IGNORE, Batch, Losses, trained_mask
from train.config import schema
from train.models import build_backbone
from train.models.backbone import Backbone
from train.models.layers import Linear, dropout
from train.objectives.by_source import losses_by_source


class Classifier(nn.Module):
    """A backbone with a linear layer over one vector per row: a logit per class, or one score without classes.

    ``forward`` gives {"loss": cross-entropy or squared error}; in evaluation also "confusion" (rows: targets, columns:
    predictions) or "scores" (pairs of prediction and target).
    """

    whole_text = False
    sources: tuple[str, ...] = ()

    def __init__(self, backbone: Backbone, objective: schema.Classify, isolate: bool) -> None:
        super().__init__()
        self.backbone, self.isolate = backbone, isolate
        self.classes, self.mean = len(objective.classes), objective.pool == "mean"
        width = backbone.model.width
        self.head = Linear(width, max(self.classes, 1), True, backbone.model.deviation(width))

    def forward(self, batch: Batch) -> Losses:
        """Loss of a batch, in nats or as squared error; in evaluation also the predictions beside their targets."""
        logits, targets = self.logits(batch), batch["targets"]
        known = trained_mask(targets)
        if self.classes:
            losses = {"loss": kernels.cross_entropy(logits, targets, ignore_index=IGNORE)}
            if "source" in batch:
                each = F.cross_entropy(logits.detach().float(), targets, ignore_index=IGNORE, reduction="none")
                losses |= losses_by_source(batch, each, self.sources)
            if not self.training:
                table = confusion_matrix(logits.argmax(-1), targets.where(known, 0), known, self.classes)
                losses["confusion"] = table, known.sum()
            return losses
        scores = logits[:, 0].float()
        error = torch.where(known, scores - targets.nan_to_num(), 0)
        losses = {"loss": (error.square().sum(), known.sum())}
        losses |= losses_by_source(batch, error.square(), self.sources)
        if not self.training:
            losses["scores"] = torch.stack((scores, targets), 1), known.sum()
        return losses

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, classes), or scores (B, 1)."""
        if self.mean:
            pooled = masked_mean(self.backbone(batch, self.isolate), batch["segments"] > 0)
        else:
            pooled = self.backbone.pooled(batch, self.isolate)
        return self.head(dropout(pooled, self.backbone.model.dropout, self.training))

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of a training step per token of rows of ``seq_len``; the head's are negligible and left out."""
        return self.backbone.flops_per_token(seq_len, causal)


def masked_mean(hidden: Tensor, real: Tensor) -> Tensor:
    """Mean (B, D) of the hidden states (B, T, D) where ``real`` (B, T) is true; zeros for an empty row."""
    shares = real / real.sum(1, keepdim=True).clamp(min=1)
    return (shares.to(hidden.dtype)[:, None] @ hidden)[:, 0]


def confusion_matrix(predictions: Tensor, targets: Tensor, known: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes) int64 over the rows (B,) that are ``known``: [i, j] is of target i, predicted as j."""
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=predictions.device)
    return counts.scatter_add_(0, targets * classes + predictions, known.long()).view(classes, classes)


def build_classify(config: schema.Config, vocab_size: int) -> Classifier:
    """Build the classifier of a run for a tokenizer of ``vocab_size`` tokens."""
    assert isinstance(config.objective, schema.Classify)
    backbone = build_backbone(config.model, vocab_size)
    if config.objective.pool == "mean" and hasattr(backbone, "pooler"):
        backbone.pooler = None  # nothing would train it
    return Classifier(backbone, config.objective, config.data.isolate)
