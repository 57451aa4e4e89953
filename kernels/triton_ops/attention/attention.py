"""Attention in Triton: the public function, which hands plain tensors to the registered forward and backward ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.segments import Segments
from kernels.torch_ops import RopeTable
from kernels.triton_ops.attention.backward_bias import run_backward_bias
from kernels.triton_ops.attention.backward_kv import run_backward_kv
from kernels.triton_ops.attention.backward_q import run_backward_q
from kernels.triton_ops.attention.forward import run_forward
from kernels.triton_ops.attention.pre_rotate import turned
from kernels.triton_ops.attention.problem import FAR, Problem, dense


@torch.library.custom_op("trireme::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_marks: Tensor | None,
    k_marks: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    before: int,
    after: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out (B, Tq, H, Dh), log-sums (B, H, Tq) in base 2) of the ``Problem`` of these arguments."""
    out, lse = _outputs(q)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_(), lse.fill_(torch.inf)
    if cos is not None and sin is not None:
        k = turned(dense(k), cos, sin)
    problem = Problem(dense(q), dense(k), dense(v), bias, q_marks, k_marks, cos, sin, before, after, scale)
    run_forward(problem, out, lse)
    return out, lse


@attention_forward.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _outputs(q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    rows, queries, heads, _ = q.shape
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((rows, heads, queries), dtype=sums)


@torch.library.custom_op("trireme::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_marks: Tensor | None,
    k_marks: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    before: int,
    after: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, if it is asked for, the bias: each dense in the shape of its input, the last else (0,)."""
    grads = grad_q, grad_k, grad_v, grad_bias = _grads(q, k, bias if for_bias else None)
    if out.numel() == 0 or k.shape[1] == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_out, q_turned, delta = dense(grad_out), None, torch.empty_like(lse)
    if cos is not None and sin is not None:
        k, q_turned = turned(dense(k), cos, sin), torch.empty_like(grad_q)
    problem = Problem(dense(q), dense(k), dense(v), bias, q_marks, k_marks, cos, sin, before, after, scale)
    run_backward_q(problem, out, lse, grad_out, q_turned, delta, grad_q)
    problem = problem if q_turned is None else problem._replace(q=q_turned)
    run_backward_kv(problem, lse, grad_out, delta, grad_k, grad_v)
    if for_bias:
        run_backward_bias(problem, lse, grad_out, delta, grad_bias)
    return grads


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _grads(q, k, bias if others[-1] else None)


def _grads(q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), grad_bias


def _keep(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, before, after, scale = inputs
    ctx.save_for_backward(*tensors, *output)  # type: ignore[arg-type]
    ctx.options = before, after, scale  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    for_bias = ctx.needs_input_grad[3]  # type: ignore[attr-defined]
    *grads, grad_bias = attention_backward(*tensors, *ctx.options, out, lse, grad_out, for_bias)  # type: ignore[attr-defined]
    return *grads, grad_bias if for_bias else None, *[None] * 7


attention_forward.register_autograd(_backward, setup_context=_keep)


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
    """See ``kernels.ops.attention``."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    before = FAR if window is None else window - 1
    after = 0 if causal else before
    tables = (None, None) if rope is None else (x.contiguous() for x in rope)
    groups = q.shape[2] // k.shape[2]
    folds = q.shape[1] == 1 < groups and rope is None and bias is None and window is None
    if folds:  # one query, at the last key, has no later key to be kept from
        q, after, segments = _fold(q, k.shape[2]), FAR, segments and segments.repeat(groups)
    marks = (None, None) if segments is None else segments.marks()
    out = attention_forward(q, k, v, bias, *marks, *tables, before, after, float(scale))[0]
    return out.transpose(1, 2).flatten(1, 2)[:, None] if folds else out


def _fold(q: Tensor, kv_heads: int) -> Tensor:
    """The heads of a group as queries of one head, (B, 1, H, Dh) -> (B, H / Hkv, Hkv, Dh): one token reads its keys once."""
    return q[:, 0].unflatten(1, (kv_heads, -1)).transpose(1, 2)
