"""The bidirectional encoder: BERT (Devlin et al. 2019).

Written for one device; ZeRO is applied from outside. Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels
from train.batch import Batch
from train.config.keys import encoder as keys
from train.models.layers import (
    Attention,
    AttentionContext,
    Embedding,
    Linear,
    Norm,
    build_mlp,
    dropout,
    linear_weights,
    run_part,
)


class EncoderLayer(nn.Module):
    """Post-norm Transformer block: attention and an MLP, each added to its input and the sum normalised."""

    def __init__(self, model: keys.Encoder, number: int) -> None:
        super().__init__()
        self.recomputed = model.recomputed(number)
        self.attention = Attention(model, causal=False)
        self.attention_norm = Norm(model)
        self.mlp = build_mlp(model)
        self.mlp_norm = Norm(model)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        x, _ = self.attention_norm(x, run_part(self.attention, self.recomputed == "attention", x, context))
        return self.mlp_norm(x, run_part(self.mlp, self.recomputed == "mlp", x))[0]


class Pooler(Linear):
    """One vector per row from its first token: a linear layer and tanh."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden (B, T, D) -> (B, D)."""
        return super().forward(hidden[:, 0]).tanh()


class Encoder(nn.Module):
    """Embeddings of tokens, positions and segment types, Transformer blocks and a pooler."""

    def __init__(self, model: keys.Encoder, vocab_size: int) -> None:
        """``vocab_size`` is the number of rows of the token embedding."""
        super().__init__()
        self.model = model
        self.max_len = model.max_len
        self.embed = Embedding(vocab_size, model.width, model.deviation(model.width))
        self.positions = Embedding(model.max_len, model.width, model.deviation(model.width))
        self.types = Embedding(model.types, model.width, model.deviation(model.width))
        self.norm = Norm(model)
        self.blocks = nn.ModuleList(EncoderLayer(model, number) for number in range(model.layers))
        self.pooler: Pooler | None = Pooler(model.width, model.width, True, model.deviation(model.width))

    def forward(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden states (B, T, D). With ``isolate`` no token sees another segment of its row; padding is never seen."""
        segments = batch["segments"] if isolate else batch["segments"].clamp(max=1)
        context = AttentionContext(segments=kernels.Segments(segments, segments))
        types = batch["types"] if "types" in batch else torch.zeros_like(batch["tokens"])
        x = self.embed(batch["tokens"]) + self.positions(batch["positions"]) + self.types(types)
        x = dropout(self.norm(x)[0], self.model.dropout, self.training)
        for block in self.blocks:
            x = run_part(block, block.recomputed == "block", x, context)
        return x

    def pooled(self, batch: Batch, isolate: bool = True) -> Tensor:
        """One vector per row (B, D), by the pooler."""
        assert self.pooler is not None
        return self.pooler(self(batch, isolate))

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """As ``Decoder.flops_per_token``, every token seeing all ``seq_len`` keys."""
        model = self.model
        return model.layers * (6 * linear_weights(self.blocks[0]) + 12 * model.width * seq_len)
