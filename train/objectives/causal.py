"""Causal language modelling: each token is predicted from those before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train import schema
from train.batch import Batch, Losses
from train.models import build_backbone
from train.objectives.head import Head


class Causal(nn.Module):
    """A backbone with a head over the vocabulary; ``forward`` gives {"loss": (sum, count)}.

    ``vocab_size`` is the tokenizer's: the rows that the embedding is rounded up by are never trained on as targets, and
    logits are cut to it.
    """

    whole_text = True
    """Every token of the text is predicted, so that bits a byte can be told."""

    def __init__(self, backbone: Any, head: Head, vocab_size: int, isolate: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.vocab_size = vocab_size
        self.isolate = isolate

    def forward(self, batch: Batch) -> Losses:
        """The loss of a batch, in nats."""
        return {"loss": self.head(self.backbone(batch, self.isolate), batch["targets"])}

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, vocab_size)."""
        return self.head(self.backbone(batch, self.isolate))[..., : self.vocab_size]

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Reads prompts (B, T), row b holding lengths[b] tokens; room for ``capacity`` tokens a row.

        Returns the logits (B, vocab_size) of each row's next token, and the state to go on from.
        """
        hidden, state = self.backbone.prefill(tokens, lengths, capacity)
        return self.head(hidden)[:, : self.vocab_size], state

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One more token (B,) for each row: the logits (B, vocab_size) of the next, and the state after it."""
        hidden, state = self.backbone.decode(token, state)
        return self.head(hidden)[:, : self.vocab_size], state

    @property
    def max_len(self) -> int:
        """The longest sequence, in tokens, prompt included."""
        return self.backbone.max_len

    @property
    def continues(self) -> bool:
        """Text goes on from its prompt."""
        return True

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of a training step per token of rows of ``seq_len``: see ``Decoder.flops_per_token``."""
        rows, width = self.backbone.embed.num_embeddings, self.backbone.embed.embedding_dim
        return self.backbone.flops_per_token(seq_len, causal) + 6 * rows * width


def build_causal(config: schema.Config, vocab_size: int) -> Causal:
    """The causal objective of a run for a tokenizer of ``vocab_size`` tokens."""
    model = config.model
    backbone = build_backbone(model, vocab_size)
    if getattr(model, "carry", False):
        backbone.remember(config.batch.global_)
    assert isinstance(config.objective, schema.Causal)
    head = Head(backbone.embed, model.tied, config.objective)
    return Causal(backbone, head, vocab_size, config.data.isolate)
