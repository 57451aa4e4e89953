"""The definition of each public op in plain torch, in float32 (float64 for float64 inputs).

Written for clarity, not speed. The public ops and the fused kernels are tested against these functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import kernels.philox as philox
from kernels.philox import Dropout
from kernels.segments import Segments, band_mask


def upcast(x: Tensor) -> Tensor:
    """``x`` in the dtype of statistics and losses: float32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    segments: Segments | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with all scores in memory; arguments as in ``kernels.ops.attention``."""
    n_queries, n_keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if rope is not None:
        q, k = (apply_rope(x, *rope) for x in (q, k))
    k, v = (upcast(x).repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", upcast(q), k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + upcast(bias)
    if segments is None:
        visible = band_mask(n_queries, n_keys, causal, window, q.device)[None]
    else:
        visible = segments.visible(causal, window)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    can_see = scores > float("-inf")
    probs = scores.masked_fill(~can_see.any(-1, keepdim=True), 0.0).softmax(-1).masked_fill(~can_see, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v).to(q.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, Dh) by cosines and sines, (B or 1, T, 1, Dh/2) each; rounds to the dtype of x."""
    a, b = upcast(x).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016)."""
    centred = upcast(x) - upcast(x).mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * upcast(weight)
    return (normed if bias is None else normed + upcast(bias)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
    return (upcast(x) / (upcast(x).square().mean(-1, keepdim=True) + eps).sqrt() * upcast(weight)).to(x.dtype)


def dropout(x: Tensor, params: Dropout) -> Tensor:
    """x / (1 - p) where 32 random bits of an element, as a number in [0, 1), are at least p; else 0. See ``philox``."""
    if params.p >= 1:
        return upcast(x) * 0
    return upcast(x) * philox.dropout_mask(x.shape, params, x.device) / (1 - params.p)


def add(x: Tensor, residual: Tensor, params: Dropout | None = None) -> Tensor:
    """The sum residual + dropout(x), in the promoted dtype of the two."""
    total = upcast(residual) + (upcast(x) if params is None else dropout(x, params))
    return total.to(torch.promote_types(x.dtype, residual.dtype))


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) where total = residual + dropout(x)."""
    total = add(x, residual, dropout)
    return layer_norm(total, weight, bias, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) where total = residual + dropout(x)."""
    total = add(x, residual, dropout)
    return rms_norm(total, weight, eps), total


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotates each pair (x[i], x[i + Dh/2]) of x (B, T, H, Dh) by positions (B, T) * theta^(-2i/Dh) radians.

    Su et al. 2021, with the two halves as pairs, as in Llama checkpoints of transformers.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half).to(x.device)
    angles = positions.double()[:, :, None, None] * frequencies
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    rotated = torch.polar(torch.ones_like(angles), angles) * pairs
    return torch.cat((rotated.real, rotated.imag), -1).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias, in the tanh form that GPT-2 was trained with (Hendrycks and Gimpel 2016)."""
    y = upcast(x) if bias is None else upcast(x) + upcast(bias)
    return (0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))).to(x.dtype)


def gated_mlp(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """silu(gate) * up, the product inside SwiGLU (Shazeer 2020), or gelu(gate) * up, inside GeGLU."""
    active = upcast(gate) * torch.sigmoid(upcast(gate)) if activation == "silu" else bias_gelu(upcast(gate))
    return (active * upcast(up)).to(gate.dtype)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of logits (N, V) at targets (N,), (sum, count): see ``kernels.ops.cross_entropy``."""
    not_ignored = targets != ignore_index
    safe_targets = torch.where(not_ignored, targets, 0)
    lse = upcast(logits).logsumexp(-1)
    losses = -(1 - label_smoothing) * (upcast(logits).gather(-1, safe_targets[:, None])[:, 0] - lse)
    losses = losses - label_smoothing * (upcast(logits) - lse[:, None]).mean(-1) + z_loss * lse**2
    return torch.where(not_ignored, losses, 0).sum(), not_ignored.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``cross_entropy`` of the logits hidden (N, D) @ weight (V, D)^T."""
    logits = upcast(hidden) @ upcast(weight).T
    return cross_entropy(logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss)
