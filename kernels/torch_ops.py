"""The public ops by the fastest exact path that torch offers on any device; tested against ``kernels.reference``."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.philox as philox
from kernels.philox import Dropout
from kernels.reference import turned, wide
from kernels.segments import Segments, additive, band


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
    """As ``kernels.ops.attention``, by torch's scaled_dot_product_attention."""
    queries, keys = q.shape[1], k.shape[1]
    if rope is not None:
        q, k = turned(q, *rope), turned(k, *rope)
    mask = None
    if segments is not None:
        mask = segments.mask(causal, window, q.dtype)
    elif window is not None or (causal and queries > 1 and (bias is not None or queries != keys)):
        # torch puts the first query at the first key, and takes either a mask or its own causal one
        mask = additive(band(queries, keys, causal, window, q.device), q.dtype)
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else mask + bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None and queries > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of the last dimension of x; weight and bias (D,)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) where total = residual + dropout(x): the step between two layers of a pre-norm transformer."""
    total = residual + (x if dropout is None else philox.dropout(x, dropout))
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of the last dimension of x; weight (D,)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) where total = residual + dropout(x)."""
    total = residual + (x if dropout is None else philox.dropout(x, dropout))
    return rms_norm(total, weight, eps), total


def dropout(x: Tensor, how: Dropout) -> Tensor:
    """``how`` applied to x (..., D)."""
    return philox.dropout(x, how)


class RopeTable(NamedTuple):
    """Cosines and sines of a batch's positions, (B, T, 1, Dh/2) float32 each: made once, used by every layer."""

    cos: Tensor
    sin: Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> RopeTable:
    """Angles of positions (B, T): frequency i of Dh/2 turns by theta^(-2i/Dh) radians a token."""
    half = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, :, None, None].float() * theta ** (-half / head_dim)
    return RopeTable(angles.cos(), angles.sin())


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotary position embedding of x (B, T, H, Dh), computed in float32, in the order of halves (see the reference)."""
    a, b = wide(x).chunk(2, -1)
    return torch.cat((a * table.cos - b * table.sin, b * table.cos + a * table.sin), -1).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x (..., D) + bias (D,), by the tanh approximation that GPT-2 was trained with."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def gated_mlp(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu"] = "silu") -> Tensor:
    """activation(gate) * up: the product inside SwiGLU with "silu", GeGLU with "gelu"."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of logits (N, V) at targets (N,) in nats: (sum, count) over the places that are not ``ignore_index``."""
    total = F.cross_entropy(
        wide(logits), targets, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    trained = targets != ignore_index
    if z_loss:
        total = total + z_loss * torch.where(trained, wide(logits).logsumexp(-1), 0).square().sum()
    return total, trained.sum()


def cross_entropy_step(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(the loss of each row of logits (N, V), its gradient or None), not by autograd; ``logits`` may be overwritten."""
    log_probs, trained = F.log_softmax(wide(logits), -1), (targets != ignore_index)[:, None]
    chosen = torch.where(trained, targets[:, None], 0)
    at_target = log_probs.gather(-1, chosen)
    losses = at_target * -(1 - label_smoothing)
    normaliser = wide(logits.gather(-1, chosen)) - at_target
    if label_smoothing:
        losses -= label_smoothing * log_probs.mean(-1, keepdim=True)
    if z_loss:
        losses += z_loss * normaliser.square()
    losses = torch.where(trained, losses, 0)[:, 0]
    if not gradient:
        return losses, None
    grad = log_probs.exp_()  # the log-probabilities are used up
    if z_loss:
        grad *= 1 + 2 * z_loss * normaliser
    if label_smoothing:
        grad -= label_smoothing / logits.shape[-1]
    one_hot = torch.full_like(at_target, 1 - label_smoothing)
    return losses, grad.scatter_add_(-1, chosen, -one_hot).mul_(trained).to(logits.dtype)


def scale_(x: Tensor, by: Tensor) -> None:
    """x *= by, a number on the same device: the product is made in float32 at least."""
    if x.dtype == by.dtype:
        x *= by
    else:
        x.copy_(wide(x) * by)
