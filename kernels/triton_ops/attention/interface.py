"""The public attention function, and the custom ops with their autograd formula that it calls."""

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
from kernels.triton_ops.attention.pre_rotate import pre_rotate
from kernels.triton_ops.attention.problem import UNBOUNDED, AttentionProblem, contiguous_rows
from kernels.triton_ops.attention.torch_backends import (
    SDP_BACKENDS,
    TRITON,
    AttentionTraits,
    fastest_backend,
    torch_attention,
)
from kernels.triton_ops.rope import rope as rope_op


@torch.library.custom_op("trireme::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_bounds: Tensor | None,
    k_bounds: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out (B, Tq, H, Dh), log-sum-exp of the scores (B, H, Tq) in base 2); arguments as in ``AttentionProblem``."""
    out, lse = _outputs(q)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_(), lse.fill_(torch.inf)
    if cos is not None and sin is not None:
        k = pre_rotate(contiguous_rows(k), cos, sin)
    qkv = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    problem = AttentionProblem(*qkv, bias, q_bounds, k_bounds, cos, sin, window_left, window_right, scale)
    run_forward(problem, out, lse)
    return out, lse


@attention_forward.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _outputs(q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised output (B, Tq, H, Dh) and log-sum-exp (B, H, Tq)."""
    batch_size, n_queries, n_heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch_size, n_heads, n_queries), dtype=lse_dtype)


@torch.library.custom_op("trireme::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_bounds: Tensor | None,
    k_bounds: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias, each contiguous in the shape of its input; the last is (0,) where not needed."""
    grads = grad_q, grad_k, grad_v, grad_bias = _gradients(q, k, bias if needs_bias_grad else None)
    if out.numel() == 0 or k.shape[1] == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_out, q_rotated, delta = contiguous_rows(grad_out), None, torch.empty_like(lse)
    if cos is not None and sin is not None:
        k, q_rotated = pre_rotate(contiguous_rows(k), cos, sin), torch.empty_like(grad_q)
    qkv = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    problem = AttentionProblem(*qkv, bias, q_bounds, k_bounds, cos, sin, window_left, window_right, scale)
    run_backward_q(problem, out, lse, grad_out, q_rotated, delta, grad_q)
    problem = problem if q_rotated is None else problem._replace(q=q_rotated)
    run_backward_kv(problem, lse, grad_out, delta, grad_k, grad_v)
    if needs_bias_grad:
        run_backward_bias(problem, lse, grad_out, delta, grad_bias)
    return grads


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(q, k, bias if others[-1] else None)


def _gradients(q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of q, k, v and bias; the last is (0,) without a bias."""
    grad_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), grad_bias


def _setup_context(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window_left, window_right, scale = inputs
    ctx.save_for_backward(*tensors, *output)  # type: ignore[arg-type]
    ctx.options = window_left, window_right, scale  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    needs_bias_grad = ctx.needs_input_grad[3]  # type: ignore[attr-defined]
    options = ctx.options  # type: ignore[attr-defined]
    *grads, grad_bias = attention_backward(*tensors, *options, out, lse, grad_out, needs_bias_grad)
    return *grads, grad_bias if needs_bias_grad else None, *[None] * 7


attention_forward.register_autograd(_backward, setup_context=_setup_context)


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
    """Scaled dot-product attention by the fastest of the Triton kernels and torch's: see ``kernels.ops.attention``."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = causal, segments, window, bias, rope, scale
    if not q.is_cuda or q.numel() == 0 or torch.compiler.is_compiling():
        return attention_by(TRITON, q, k, v, *options)
    traits = AttentionTraits(
        dtype=q.dtype,
        head_dim=q.shape[3],
        groups=q.shape[2] // k.shape[2],
        kind=("packed " if segments is not None else "") + ("causal" if causal else "full"),
        n_queries=q.shape[1],
        n_keys=k.shape[1],
        windowed=window is not None,
        biased=bias is not None,
        roped=rope is not None,
        scale=scale,
        capability=torch.cuda.get_device_capability(q.device),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    backend = fastest_backend(traits, lambda name, q, k, v: attention_by(name, q, k, v, *options), q, k, v)
    return attention_by(backend, q, k, v, *options)


def attention_by(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    segments: Segments | None,
    window: int | None,
    bias: Tensor | None,
    rope: RopeTable | None,
    scale: float,
) -> Tensor:
    """Attention by one of ``eligible_backends``; by the Triton kernels where the ids of documents are not in runs."""
    offsets = None if segments is None or backend == TRITON else segments.run_offsets()
    if backend == TRITON or (segments is not None and offsets is None):
        return _attention_in_triton(q, k, v, causal, segments, window, bias, rope, scale)
    if rope is not None:
        q, k = rope_op(q, rope), rope_op(k, rope)
    return torch_attention(q, k, v, causal, scale, offsets, SDP_BACKENDS[backend])


def _attention_in_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    segments: Segments | None,
    window: int | None,
    bias: Tensor | None,
    rope: RopeTable | None,
    scale: float,
) -> Tensor:
    if scale <= 0:  # the kernels take the row maximum of the unscaled scores
        q, scale = q * scale, 1.0
    window_left = UNBOUNDED if window is None else window - 1
    window_right = 0 if causal else window_left
    tables = (None, None) if rope is None else (x.contiguous() for x in rope)
    groups = q.shape[2] // k.shape[2]
    folds = q.shape[1] == 1 < groups and rope is None and bias is None and window is None
    if folds:  # a single query is aligned with the last key, so causality hides nothing from it
        q, window_right, segments = _fold_group(q, k.shape[2]), UNBOUNDED, segments and segments.repeat_queries(groups)
    bounds = (None, None) if segments is None else segments.bounds()
    out = attention_forward(q, k, v, bias, *bounds, *tables, window_left, window_right, float(scale))[0]
    return out.transpose(1, 2).flatten(1, 2)[:, None] if folds else out


def _fold_group(q: Tensor, n_kv_heads: int) -> Tensor:
    """The heads of a group as queries of one head, (B, 1, H, Dh) -> (B, H / Hkv, Hkv, Dh): decoding reads keys once."""
    return q[:, 0].unflatten(1, (n_kv_heads, -1)).transpose(1, 2)
