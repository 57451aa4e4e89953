"""What right means: each public op written out in plain torch, in float32 (float64 for float64 inputs).

Slow and plain by intent. The public ops and the fused kernels are tested against these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import kernels.philox as philox
from kernels.philox import Dropout
from kernels.segments import Segments, band


def wide(x: Tensor) -> Tensor:
    """``x`` in the format that statistics and losses are computed in."""
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
    """softmax(q k^T * scale + bias) v: q (B, Tq, H, Dh), k and v (B, Tk, Hkv, Dh), Hkv dividing H -> (B, Tq, H, Dh).

    Query head h reads key head h // (H / Hkv) (Ainslie et al. 2023). The last query stands at the last key: with ``causal`` a
    query sees no key after its own place, with ``window`` only keys less than ``window`` places away (with ``causal``: the
    last ``window`` keys up to its own place). With ``segments`` a token sees only its own document. A query that sees no key
    at all gives 0, and has gradients of 0.

    ``bias`` (B or 1, H or 1, Tq, Tk) is added to the scaled scores; -inf hides a key. ``rope`` turns q and k first
    (self-attention: Tq = Tk). ``scale`` is 1/sqrt(Dh) unless given.
    """
    queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if rope is not None:
        q, k = (turned(x, *rope) for x in (q, k))
    k, v = (wide(x).repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", wide(q), k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + wide(bias)
    visible = (
        band(queries, keys, causal, window, q.device)[None] if segments is None else segments.visible(causal, window)
    )
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    seen = scores > float("-inf")
    weights = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``rope`` by a table of cosines and sines, (B or 1, T, 1, Dh/2) each, rounded to the format of x."""
    a, b = wide(x).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016)."""
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * wide(weight)
    return (normed if bias is None else normed + wide(bias)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean of squares + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
    return (wide(x) / (wide(x).square().mean(-1, keepdim=True) + eps).sqrt() * wide(weight)).to(x.dtype)


def dropout(x: Tensor, how: Dropout) -> Tensor:
    """X where 32 random bits of each element, read as a number in [0, 1), are at least p, over 1 - p; else 0."""
    return wide(x) * philox.keep(x.shape, how, x.device) / (1 - how.p) if how.p < 1 else wide(x) * 0


def add(x: Tensor, residual: Tensor, how: Dropout | None = None) -> Tensor:
    """Residual + dropout(x) in the wider dtype of the two."""
    total = wide(residual) + (wide(x) if how is None else dropout(x, how))
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
    """Each pair (x[i], x[i + Dh/2]) of x (B, T, H, Dh) turned by positions (B, T) * theta^(-2i/Dh) radians.

    Su et al. 2021, in the order of halves that Llama checkpoints of transformers use.
    """
    half = x.shape[-1] // 2
    angles = positions.double()[:, :, None, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half).to(
        x.device
    )
    turned = torch.polar(torch.ones_like(angles), angles) * torch.complex(
        x[..., :half].double(), x[..., half:].double()
    )
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y * normal CDF(y) of y = x + bias, by the tanh approximation that GPT-2 was trained with (Hendrycks and Gimpel 2016)."""
    y = wide(x) if bias is None else wide(x) + wide(bias)
    return (0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))).to(x.dtype)


def gated_mlp(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """gate * sigmoid(gate) * up: the product inside SwiGLU (Shazeer 2020); with gelu(gate) inside GeGLU."""
    active = wide(gate) * torch.sigmoid(wide(gate)) if activation == "silu" else bias_gelu(wide(gate))
    return (active * wide(up)).to(gate.dtype)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of logits (N, V) at targets (N,), summed over the places that are not ``ignore_index``: (sum, count).

    A place costs the cross-entropy, in nats, of softmax(logits) to its target; of the target's probability
    ``label_smoothing`` is spread evenly over the vocabulary (Szegedy et al. 2016). ``z_loss`` * logsumexp(logits)^2 is added
    (PaLM, section 5). The sum is float32 (float64 for float64 logits), the count int64.
    """
    trained = targets != ignore_index
    chosen = torch.where(trained, targets, 0)
    normaliser = wide(logits).logsumexp(-1)
    losses = -(1 - label_smoothing) * (wide(logits).gather(-1, chosen[:, None])[:, 0] - normaliser)
    losses = losses - label_smoothing * (wide(logits) - normaliser[:, None]).mean(-1) + z_loss * normaliser**2
    return torch.where(trained, losses, 0).sum(), trained.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``cross_entropy`` of hidden (N, D) @ weight (V, D)^T."""
    logits = wide(hidden) @ wide(weight).T
    return cross_entropy(logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss)
