"""Attention in Triton: the public function, which hands plain tensors to the registered forward and backward ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels import dispatch, torch_ops
from kernels.triton_ops.attention_backward import attention_backward
from kernels.triton_ops.attention_bias import attention_bias_backward
from kernels.triton_ops.attention_forward import attention_forward
from kernels.triton_ops.attention_tiles import FAR, WIDEST
from kernels.segments import Segments
from kernels.torch_ops import RopeTable


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
    """See ``kernels.ops.attention``. Raises ValueError where Triton was asked for and heads are wider than ``WIDEST``."""
    if q.shape[-1] > WIDEST:
        if dispatch.asked() == "triton":
            raise ValueError(f"kernels=triton has attention for heads up to {WIDEST} wide, not {q.shape[-1]}: kernels=auto")
        options = {"segments": segments, "window": window, "bias": bias, "rope": rope, "scale": scale}
        return torch_ops.attention(q, k, v, causal=causal, **options)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    before = FAR if window is None else window - 1
    after = 0 if causal else before
    tables = (None, None) if rope is None else (x.contiguous() for x in rope)
    if folds := q.shape[1] == 1 < q.shape[2] // k.shape[2] and rope is bias is window is None:
        q, segments, after = _fold(q, k.shape[2]), segments and segments.repeat(q.shape[2] // k.shape[2]), FAR
    marks = (None, None) if segments is None else segments.marks()
    out = attention_forward(q, k, v, bias, *tables, *marks, before, after, float(scale))[0]
    return out.transpose(1, 2).flatten(1, 2)[:, None] if folds else out


def _fold(q: Tensor, kv_heads: int) -> Tensor:
    """The heads of a group as queries of one head, (B, 1, H, Dh) -> (B, H / Hkv, Hkv, Dh): one token reads its keys once."""
    return q[:, 0].unflatten(1, (kv_heads, -1)).transpose(1, 2)


def _keep(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, before, after, scale = inputs
    ctx.save_for_backward(*tensors, *output)  # type: ignore[arg-type]
    ctx.options = before, after, scale  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias, cos, sin, q_marks, k_marks, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    inputs, options = (grad_out, q, k, v, bias, cos, sin, q_marks, k_marks), ctx.options  # type: ignore[attr-defined]
    *grads, delta = attention_backward(*inputs, out, lse, *options)
    grad_bias = None
    if ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
        grad_bias = attention_bias_backward(*inputs, lse, delta, *options)
    return *grads, grad_bias, *[None] * 7


attention_forward.register_autograd(_backward, setup_context=_keep)
