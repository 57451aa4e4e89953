"""Causal language modelling: each token is predicted from those before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernels
from train import schema
from train.batch import IGNORE, Batch, Losses
from train.errors import UserError
from train.models import build_backbone
from train.models.decoder import Decoder, DecoderState
from train.models.layers import Embedding


class Head(nn.Module):
    """The output matrix (V, D): its own, or the token embedding's very parameter where the model is tied.

    A tied parameter is registered here too, so that ZeRO-3 gathers it for this module's forward as for the embedding's.
    ``named_parameters`` knows it by the embedding's name alone; in ``state_dict`` both names lead to the same storage.
    """

    def __init__(self, embed: Embedding, tied: bool, objective: schema.Objective) -> None:
        super().__init__()
        self.regularisers = {"label_smoothing": objective.label_smoothing, "z_loss": objective.z_loss}
        self.init_std = embed.init_std
        self.weight = embed.weight if tied else nn.Parameter(torch.empty_like(embed.weight))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Any:
        """Logits (..., V) of hidden (..., D); or, given targets of its leading shape, their loss as (sum, count).

        In training the loss has the objective's label smoothing and z-loss, in evaluation it is the bare cross-entropy.
        """
        if targets is None:
            return nn.functional.linear(hidden, self.weight)
        more = self.regularisers if self.training else {}
        return kernels.linear_cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten(), ignore_index=IGNORE, **more)


class Causal(nn.Module):
    """A backbone with a head over the vocabulary; ``forward`` gives {"loss": (sum, count)}.

    ``vocab_size`` is the tokenizer's: the rows that the embedding is rounded up by are never trained on as targets, and
    logits are cut to it.
    """

    def __init__(self, backbone: Decoder, head: Head, vocab_size: int, isolate: bool) -> None:
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

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, DecoderState]:
        """Reads prompts (B, T), row b holding lengths[b] tokens; room for ``capacity`` tokens a row.

        Returns the logits (B, vocab_size) of each row's next token, and the state to go on from.
        """
        hidden, state = self.backbone.prefill(tokens, lengths, capacity)
        return self.head(hidden)[:, : self.vocab_size], state

    def decode(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
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
    """The causal objective of a run for a tokenizer of ``vocab_size`` tokens. Raises UserError where sizes do not
    fit."""
    model = config.model
    if config.batch.seq_len > model.max_len:
        raise UserError(
            f"batch.seq_len={config.batch.seq_len} is longer than model.max_len={model.max_len}; "
            "shorten the rows or raise model.max_len"
        )
    backbone = build_backbone(model, vocab_size)
    head = Head(backbone.embed, model.tied, config.objective)
    return Causal(backbone, head, vocab_size, config.data.isolate)
