"""The public ops on torch's own functions, by the fastest exact path on any device."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.cpu_attention as cpu_attention
import kernels.philox as philox
from kernels.philox import Dropout
from kernels.reference import apply_rope, upcast
from kernels.segments import Segments, additive_mask, band_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    segments: Segments | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    rope: RopeTable | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention by torch's scaled_dot_product_attention, or ``cpu_attention``: see ``kernels.ops.attention``."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    if cpu_attention.is_faster(q, k, segments, bias):
        return cpu_attention.self_attention(q, k, v, causal, segments, window, scale)
    mask = None
    if segments is not None:
        mask = segments.mask(causal, window, q.dtype)
    elif window is not None or (causal and n_queries > 1 and (bias is not None or n_queries != n_keys)):
        # torch aligns the first query with the first key, and takes either a mask or is_causal
        mask = additive_mask(band_mask(n_queries, n_keys, causal, window, q.device), q.dtype)
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else mask + bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None and n_queries > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x (..., D); weight and bias (D,)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) where total = residual + dropout(x)."""
    total = residual + (x if dropout is None else philox.dropout(x, dropout))
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x (..., D); weight (D,)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) where total = residual + dropout(x)."""
    total = residual + (x if dropout is None else philox.dropout(x, dropout))
    return rms_norm(total, weight, eps), total


def dropout(x: Tensor, params: Dropout) -> Tensor:
    """Dropout of x (..., D): see ``kernels.philox.dropout``."""
    return philox.dropout(x, params)


class RopeTable(NamedTuple):
    """Cosines and sines of a batch's positions, (B, T, 1, Dh/2) float32 each: computed once, read by every layer."""

    cos: Tensor
    sin: Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> RopeTable:
    """Rotary table of positions (B, T): pair i of Dh/2 rotates by theta^(-2i/Dh) radians per token."""
    twice_i = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, :, None, None].float() * theta ** (-twice_i / head_dim)
    return RopeTable(angles.cos(), angles.sin())


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotary position embedding of x (B, T, H, Dh), computed in float32, or in float64 for float64 inputs."""
    return apply_rope(x, *table)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x (..., D) + bias (D,), in the tanh form that GPT-2 was trained with."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def gated_mlp(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu"] = "silu") -> Tensor:
    """activation(gate) * up (..., D): the product inside SwiGLU with "silu", inside GeGLU with "gelu"."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the losses of logits (N, V) at targets (N,): see ``kernels.ops.cross_entropy``."""
    total = F.cross_entropy(
        upcast(logits), targets, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    not_ignored = targets != ignore_index
    if z_loss:
        total = total + z_loss * torch.where(not_ignored, upcast(logits).logsumexp(-1), 0).square().sum()
    return total, not_ignored.sum()


def cross_entropy_with_grad(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(loss of each row of logits (N, V), its gradient or None), outside autograd; may overwrite ``logits``."""
    log_probs, not_ignored = F.log_softmax(upcast(logits), -1), (targets != ignore_index)[:, None]
    safe_targets = torch.where(not_ignored, targets[:, None], 0)
    target_log_prob = log_probs.gather(-1, safe_targets)
    losses = target_log_prob * -(1 - label_smoothing)
    lse = upcast(logits.gather(-1, safe_targets)) - target_log_prob
    if label_smoothing:
        losses -= label_smoothing * log_probs.mean(-1, keepdim=True)
    if z_loss:
        losses += z_loss * lse.square()
    losses = torch.where(not_ignored, losses, 0)[:, 0]
    if not needs_grad:
        return losses, None
    grad = log_probs.exp_()  # in place: the log-probabilities are not needed any more
    if z_loss:
        grad *= 1 + 2 * z_loss * lse
    if label_smoothing:
        grad -= label_smoothing / logits.shape[-1]
    one_hot = torch.full_like(target_log_prob, 1 - label_smoothing)
    return losses, grad.scatter_add_(-1, safe_targets, -one_hot).mul_(not_ignored).to(logits.dtype)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a single number on the same device; the product is computed in float32 or wider."""
    if x.dtype == factor.dtype:
        x *= factor
    else:
        x.copy_(upcast(x) * factor)
