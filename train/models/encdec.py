"""Encoder-decoder transformer, with settings for T5 and the original Transformer.

T5: Raffel et al. 2020. The original: Vaswani et al. 2017.

Written for one device; ZeRO is applied from outside. Shapes: B rows, T tokens of the source, U of the target, D width,
H heads.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from train.batch import Batch
from train.config.keys import encdec as keys
from train.models.layers import (
    Attention,
    AttentionContext,
    Embedding,
    KVCache,
    Linear,
    Norm,
    build_mlp,
    dropout,
    linear_weights,
    query_std,
    residual_std,
    run_part,
)


class CrossAttention(nn.Module):
    """Attention of the target's tokens to the encoder's output."""

    def __init__(self, model: keys.EncDec) -> None:
        super().__init__()
        self.head_dim = model.head_dim or model.width // model.heads
        self.scale = None if model.scaled else 1.0
        inner = model.heads * self.head_dim
        self.q = Linear(model.width, inner, model.bias, query_std(model, self.head_dim))
        self.kv = Linear(model.width, 2 * inner, model.bias, model.deviation(model.width))
        self.out = Linear(inner, model.width, model.bias, residual_std(model, inner))

    def project_source(self, source: Tensor) -> Tensor:
        """Keys and values (B, T, 2H, Dh) of the encoder's output (B, T, D)."""
        return self.kv(source).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, source: Tensor, context: AttentionContext) -> Tensor:
        """X (B, U, D) and the encoder's output (B, T, D), or its keys and values (B, T, 2H, Dh), -> (B, U, D)."""
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        k, v = (self.project_source(source) if source.ndim == 3 else source).chunk(2, 2)
        y = kernels.attention(q, k, v, causal=False, segments=context.segments, scale=self.scale)
        return self.out(y.flatten(-2))


class ResidualLayer(nn.Module):
    """Residual connection around a layer, pre-norm x + layer(norm(x)) or post-norm norm(x + layer(x)), with dropout."""

    def __init__(self, model: keys.EncDec, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.p = model.norm_first, model.dropout
        self.norm = Norm(model)
        self.layer = layer

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        """X (B, T, D) -> (B, T, D); ``inputs`` are further arguments of the layer."""
        if self.first:
            return x + dropout(self.layer(self.norm(x)[0], *inputs), self.p, self.training)
        return self.norm(x, self.layer(x, *inputs))[0]


class EncDecEncoderBlock(nn.Module):
    """Encoder block: bidirectional attention and an MLP."""

    def __init__(self, model: keys.EncDec, number: int) -> None:
        super().__init__()
        self.recomputed = model.recomputed(number)
        self.attention = ResidualLayer(model, Attention(model, causal=False))
        self.mlp = ResidualLayer(model, build_mlp(model))

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        x = run_part(self.attention, self.recomputed == "attention", x, context)
        return run_part(self.mlp, self.recomputed == "mlp", x)


class EncDecDecoderBlock(nn.Module):
    """Decoder block: causal attention, cross-attention to the source and an MLP."""

    def __init__(self, model: keys.EncDec, number: int) -> None:
        super().__init__()
        self.recomputed = model.recomputed(number)
        self.attention = ResidualLayer(model, Attention(model))
        self.cross = ResidualLayer(model, CrossAttention(model))
        self.mlp = ResidualLayer(model, build_mlp(model))

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        source: Tensor,
        across: AttentionContext,
        cache: KVCache | None = None,
    ) -> Tensor:
        """X (B, U, D), encoder output (B, T, D) -> (B, U, D); ``across`` has the segments of the cross-attention."""
        attends = self.recomputed == "attention"
        x = run_part(self.attention, attends, x, context, cache)
        x = run_part(self.cross, attends, x, source, across)
        return run_part(self.mlp, self.recomputed == "mlp", x)


class RelativeBias(Embedding):
    """T5's relative position bias: a number per bucket of distances and head, added to the attention scores."""

    def __init__(self, model: keys.EncDec, both_ways: bool) -> None:
        super().__init__(model.buckets, model.heads, model.deviation(model.width))
        self.both_ways, self.furthest = both_ways, model.max_distance

    def forward(self, distance: Tensor) -> Tensor:
        """Bias (1, H, Tq, Tk) for distances (Tq, Tk), key position minus query position."""
        bucket = relative_buckets(distance, self.num_embeddings, self.furthest, self.both_ways)
        return super().forward(bucket).permute(2, 0, 1)[None]


def relative_buckets(distance: Tensor, count: int, furthest: int, both_ways: bool) -> Tensor:
    """T5's bucket of each distance (key minus query): one per near distance, then logarithmic up to ``furthest``.

    With ``both_ways`` half of the buckets are for keys after the query; else such keys count as distance 0.
    """
    after = torch.zeros_like(distance)
    if both_ways:
        count //= 2
        after = (distance > 0) * count
        near = distance.abs()
    else:
        near = (-distance).clamp(min=0)
    exact = count // 2
    share = (near.clamp(min=1).float() / exact).log() / math.log(furthest / exact)
    wide = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
    return after + torch.where(near < exact, near, wide)


class Stack(nn.Module):
    """Blocks of the encoder or the decoder, their relative position bias, and a final norm in pre-norm models."""

    def __init__(self, model: keys.EncDec, block: Any, both_ways: bool) -> None:
        super().__init__()
        self.model = model
        self.relative = RelativeBias(model, both_ways) if model.position == "relative" else None
        self.blocks = nn.ModuleList(block(model, number) for number in range(model.layers))
        self.norm = Norm(model) if model.norm_first else None

    def forward(self, x: Tensor, segments: kernels.Segments, *inputs: Any) -> Tensor:
        """Embeddings (B, T, D) -> hidden states (B, T, D); ``inputs`` are further arguments of each block."""
        x = dropout(x, self.model.dropout, self.training)
        positions = torch.arange(x.shape[1], device=x.device)
        bias = None if self.relative is None else self.relative(positions - positions[:, None])
        context = AttentionContext(segments=segments, bias=bias)
        for block in self.blocks:
            x = run_part(block, block.recomputed == "block", x, context, *inputs)
        return x if self.norm is None else dropout(self.norm(x)[0], self.model.dropout, self.training)


@dataclass
class EncDecState:
    """Decoding state: per block the keys and values of the source, and the KV cache of the target's own tokens.

    ``visible`` (B, T) int64 is 1 where the source is not padding. All rows have ``length`` target tokens.
    """

    source: list[Tensor]
    caches: list[KVCache]
    visible: Tensor
    length: int

    def rows(self, index: Tensor) -> EncDecState:
        """State whose row i is row index[i] of this one."""
        caches = [cache.rows(index) for cache in self.caches]
        return EncDecState([kv[index] for kv in self.source], caches, self.visible[index], self.length)


class EncDec(nn.Module):
    """Encoder-decoder with one shared token embedding, without a head."""

    def __init__(self, model: keys.EncDec, vocab_size: int) -> None:
        """``vocab_size`` is the number of rows of the embedding, padding included."""
        super().__init__()
        self.model = model
        self.max_len = sys.maxsize
        relative = model.position == "relative"
        self.scale = 1.0 if relative else math.sqrt(model.width)
        self.head_scale = model.width**-0.5 if relative and model.tied else 1.0
        self.embed = Embedding(vocab_size, model.width, 1.0 if relative else model.width**-0.5)
        self.encoder = Stack(model, EncDecEncoderBlock, both_ways=True)
        self.decoder = Stack(model, EncDecDecoderBlock, both_ways=False)

    def forward(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden states of the target (B, U, D). With ``isolate`` no token sees another segment; none sees padding."""
        source, target = batch["segments"], batch["target_segments"]
        if not isolate:
            source, target = source.clamp(max=1), target.clamp(max=1)
        hidden = self.encoder(self._embedded(batch["tokens"], batch["positions"]), kernels.Segments(source, source))
        positions = torch.arange(target.shape[1], device=target.device)[None]
        x = self._embedded(batch["target_tokens"], positions)
        across = AttentionContext(segments=kernels.Segments(target, source))
        return self.decoder(x, kernels.Segments(target, target), hidden, across)

    def pooled(self, batch: Batch, isolate: bool = True) -> Tensor:
        """One vector per row (B, D): the decoder's hidden state of a first target token, given the whole source."""
        first = torch.zeros_like(batch["tokens"][:, :1])
        target = {"target_tokens": first, "target_segments": batch["segments"][:, :1]}
        return self({**batch, **target}, isolate)[:, 0]

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, EncDecState]:
        """Read sources (B, T), row b holding lengths[b] tokens, the last of which is the first token of its target.

        Returns the hidden state (B, D) of that token, and the decoding state; a target may have ``capacity`` tokens.
        """
        rows = torch.arange(len(tokens), device=tokens.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        visible = (positions < lengths[:, None] - 1).long()
        hidden = self.encoder(self._embedded(tokens, positions), kernels.Segments(visible, visible))
        blocks: Any = self.decoder.blocks
        source = [block.cross.layer.project_source(hidden) for block in blocks]
        state = EncDecState(source, [KVCache(capacity) for _ in blocks], visible, 0)
        return self.decode(tokens[rows, lengths - 1], state)

    def decode(self, token: Tensor, state: EncDecState) -> tuple[Tensor, EncDecState]:
        """Read one more target token (B,) per row: its hidden state (B, D), and the state after it."""
        position, relative = torch.full_like(token, state.length), self.decoder.relative
        distance = torch.arange(-state.length, 1, device=token.device)[None]
        bias = None if relative is None else relative(distance)
        context = AttentionContext(bias=bias, ends=position if state.length else None, longest=state.length)
        across = AttentionContext(segments=kernels.Segments(torch.ones_like(token)[:, None], state.visible))
        x = self._embedded(token[:, None], position[:, None])
        for block, source, cache in zip(self.decoder.blocks, state.source, state.caches, strict=True):
            x = block(x, context, source, across, cache)
        x = x if self.decoder.norm is None else self.decoder.norm(x)[0]
        return x[:, 0], EncDecState(state.source, state.caches, state.visible, state.length + 1)

    def flops_per_token(self, seq_len: int, causal: bool = True, targets: float = 0.0) -> float:
        """FLOPs per token of the source, with ``targets`` target tokens for each: see ``Decoder.flops_per_token``."""
        model, inner = self.model, self.model.heads * (self.model.head_dim or self.model.width // self.model.heads)
        length = targets * seq_len
        own = (length + 1) / 2 if causal else length
        encoder = 6 * linear_weights(self.encoder.blocks[0]) + 12 * inner * seq_len
        cross = 6 * model.width * 2 * inner  # keys and values are computed once per source token
        decoder = 6 * linear_weights(self.decoder.blocks[0]) - cross + 12 * inner * (own + seq_len)
        return model.layers * (encoder + cross * (targets > 0) + targets * decoder)

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.model.position == "relative":
            return x
        return x * self.scale + sinusoidal_positions(positions, self.model.width).to(x.dtype)


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """Position encodings (B, T, D) float32: sin and cos of position / 10000^(2i/D) (Vaswani et al. 2017, 3.5)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[..., None].float() * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
