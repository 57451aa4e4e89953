"""The public ops: ``kernels.reference`` defines each, ``kernels.dispatch`` chooses what runs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kernels.dispatch import implementation, torch_only
from kernels.linear_ce import chunked_linear_cross_entropy
from kernels.philox import Dropout
from kernels.segments import Segments
from kernels.torch_ops import RopeTable

MAX_HEAD_DIM = 256
"""Largest head dimension of the attention kernels: two tiles and an accumulator of it still fit a multiprocessor."""


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
    """Scaled dot-product attention, softmax(q k^T * scale + bias) v -> (B, Tq, H, Dh).

    q is (B, Tq, H, Dh), k and v are (B, Tk, Hkv, Dh) where Hkv divides H; query head h reads key head h // (H / Hkv)
    (Ainslie et al. 2023). The last query is aligned with the last key: with ``causal`` a query sees no key after its
    own position, with ``window`` only keys less than ``window`` positions away (with ``causal``: the last ``window``
    keys up to its own position). With ``segments`` a token sees only its own document. A query that sees no key gives 0
    and has gradients of 0.

    ``bias`` (B or 1, H or 1, Tq, Tk) is added to the scaled scores; -inf hides a key. ``rope`` rotates q and k first
    (self-attention: Tq = Tk). ``scale`` is 1/sqrt(Dh) unless given. Raises ValueError for Dh > 256 if Triton is
    requested.
    """
    fits = q.shape[-1] <= MAX_HEAD_DIM
    module = implementation(q) if fits else torch_only(f"attention of heads {q.shape[-1]} wide, only {MAX_HEAD_DIM}")
    options = {"segments": segments, "window": window, "bias": bias, "rope": rope, "scale": scale}
    return module.attention(q, k, v, causal=causal, **options)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x (..., D) (Ba et al. 2016); weight and bias (D,)."""
    return implementation(x).layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) where total = residual + dropout(x), as between layers of a pre-norm transformer.

    x and residual (..., D) may differ in dtype: both results have the promoted dtype.
    """
    return implementation(x).add_layer_norm(x, residual, weight, bias, eps, dropout)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x (..., D) (Zhang and Sennrich 2019); weight (D,)."""
    return implementation(x).rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) where total = residual + dropout(x): see ``add_layer_norm``."""
    return implementation(x).add_rms_norm(x, residual, weight, eps, dropout)


def dropout(x: Tensor, params: Dropout) -> Tensor:
    """Zeroes each element of x (..., D) with probability params.p and divides the others by 1 - params.p."""
    return implementation(x).dropout(x, params)


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotary position embedding of x (B, T, H, Dh), with halves as pairs, computed in float32 or wider."""
    return implementation(x).rope(x, table)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x (..., D) + bias (D,), in the tanh form that GPT-2 was trained with."""
    return implementation(x).bias_gelu(x, bias)


def gated_mlp(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu"] = "silu") -> Tensor:
    """activation(gate) * up (..., D), as in SwiGLU ("silu") and GeGLU ("gelu"); halves of one tensor are not copied."""
    return implementation(gate).gated_mlp(gate, up, activation)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of logits (N, V): (sum, count) over the targets (N,) that are not ``ignore_index``.

    The sum is float32 (float64 for float64 logits), the count int64. Of a target's probability ``label_smoothing`` is
    spread evenly over the vocabulary (Szegedy et al. 2016); ``z_loss`` * logsumexp(logits)^2 is added per target (PaLM,
    section 5).
    """
    return implementation(logits).cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``cross_entropy`` of hidden (N, D) @ weight (V, D)^T in chunks of tokens: all logits never exist at once.

    Under autocast the products have its dtype. Gradients are computed in the forward pass, if an input requires them.
    """
    return chunked_linear_cross_entropy(hidden, weight, targets, ignore_index, label_smoothing, z_loss)[:2]


def linear_cross_entropy_by_target(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_cross_entropy``, and the loss of each target (N,), 0 for those ignored, without gradient."""
    return chunked_linear_cross_entropy(hidden, weight, targets, ignore_index, label_smoothing, z_loss)
