"""The public ops. What each means is written in ``kernels.reference``; which implementation runs, ``kernels.dispatch`` says."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kernels.dispatch import ops, torchs
from kernels.linear_cross_entropy import chunked_linear_cross_entropy
from kernels.philox import Dropout
from kernels.segments import Segments
from kernels.torch_ops import RopeTable

WIDEST_HEAD = 256
"""Of attention's kernels: two tiles and an accumulator of this width still fit a multiprocessor's memory and registers."""


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
    """softmax(q k^T * scale + bias) v: q (B, Tq, H, Dh), k and v (B, Tk, Hkv, Dh), Hkv dividing H -> (B, Tq, H, Dh).

    Query head h reads key head h // (H / Hkv) (Ainslie et al. 2023). The last query stands at the last key: with ``causal`` a
    query sees no key after its own place, with ``window`` only keys less than ``window`` places away (with ``causal``: the
    last ``window`` keys up to its own place). With ``segments`` a token sees only its own document. A query that sees no key
    at all gives 0, and has gradients of 0.

    ``bias`` (B or 1, H or 1, Tq, Tk) is added to the scaled scores; -inf hides a key. ``rope`` turns q and k first
    (self-attention: Tq = Tk). ``scale`` is 1/sqrt(Dh) unless given.
    """
    chosen = (
        ops(q) if q.shape[-1] <= WIDEST_HEAD else torchs(f"attention of heads {q.shape[-1]} wide, only {WIDEST_HEAD}")
    )
    options = {"segments": segments, "window": window, "bias": bias, "rope": rope, "scale": scale}
    return chosen.attention(q, k, v, causal=causal, **options)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of the last dimension of x; weight and bias (D,)."""
    return ops(x).layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) where total = residual + dropout(x): the step between two layers of a pre-norm transformer.

    x and residual (..., D) may differ in dtype: both results have the wider one.
    """
    return ops(x).add_layer_norm(x, residual, weight, bias, eps, dropout)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of the last dimension of x; weight (D,)."""
    return ops(x).rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) where total = residual + dropout(x): as ``add_layer_norm``."""
    return ops(x).add_rms_norm(x, residual, weight, eps, dropout)


def dropout(x: Tensor, how: Dropout) -> Tensor:
    """X (..., D), each element zeroed with probability how.p and the others divided by 1 - how.p; how.seed names the mask."""
    return ops(x).dropout(x, how)


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotary position embedding of x (B, T, H, Dh), computed in float32, in the order of halves (see the reference)."""
    return ops(x).rope(x, table)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x (..., D) + bias (D,), by the tanh approximation that GPT-2 was trained with."""
    return ops(x).bias_gelu(x, bias)


def gated_mlp(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu"] = "silu") -> Tensor:
    """activation(gate) * up: the product inside SwiGLU with "silu", GeGLU with "gelu". Halves of one tensor are not copied."""
    return ops(gate).gated_mlp(gate, up, activation)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of logits (N, V) at targets (N,) in nats: (sum, count) over the places that are not ``ignore_index``.

    The sum is float32 (float64 for float64 logits), the count int64. Of a target's probability ``label_smoothing`` is spread
    evenly over the vocabulary (Szegedy et al. 2016); ``z_loss`` * logsumexp(logits)^2 is added to every place (PaLM, section 5).
    """
    return ops(logits).cross_entropy(
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
    """``cross_entropy`` of hidden (N, D) @ weight (V, D)^T; where tokens are many, the logits of a chunk are all that ever exist.

    Under autocast the products are of its dtype. Gradients are made in the forward pass where they are wanted.
    """
    return chunked_linear_cross_entropy(hidden, weight, targets, ignore_index, label_smoothing, z_loss)
