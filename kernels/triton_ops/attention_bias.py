"""The gradient of an additive bias of attention: dS summed over the rows and heads that share the bias.

A program owns a tile of the bias's gradient and walks over everything that was broadcast, making the scores again each time
(see ``attention_backward``): a sum in one program in a fixed order, so two runs are equal bit for bit, at two products of the
backward's seven. Nothing but the gradient itself is written.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning
from kernels.triton_ops.attention_tiles import (
    LOG2_E,
    bias_strides,
    columns,
    constants,
    load_tile,
    sees,
    shape_class,
    turned,
    unit_stride,
)
from kernels.launch import dot, launch


@triton.jit
def _attention_backward_bias_kernel(
    q,  # (B, Tq, H, Dh), turned
    k,  # (B, Tk, Hkv, Dh), turned
    v,  # (B, Tk, Hkv, Dh)
    bias,  # (B or 1, H or 1, Tq, Tk)
    q_marks,  # (B, 4, Tq) int32 or None
    k_marks,  # (B, 4, Tk) int32 or None
    lse,  # (B, H, Tq)
    grad_out,  # (B, Tq, H, Dh)
    delta,  # (B, H, Tq)
    grad_bias,  # (B or 1, H or 1, Tq, Tk), written
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    grad_b,
    grad_t,
    grad_h,
    bias_b,
    bias_h,
    bias_q,
    bias_k,
    queries,
    keys,
    heads,
    bias_heads,
    shared_rows,  # B where the bias has one row for all, else 1
    shared_heads,
    before,
    after,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across = (keys + BLOCK_N - 1) // BLOCK_N
    at_q = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    at_k = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, others = tl.minimum(at_q, queries - 1), tl.minimum(at_k, keys - 1)
    far_q, far_k = rows.to(tl.int64)[:, None], others.to(tl.int64)[:, None]
    start, stop, _ = sees(rows, keys - queries, before, after, 0, keys, None, queries)
    seen = (at_k[None, :] >= start[:, None]) & (at_k[None, :] < stop[:, None])
    cols, kept = columns(HEAD_DIM, BLOCK_D, False)
    wide: tl.constexpr = lse.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), wide)
    some = tl.max(seen.to(tl.int32)) > 0
    for step in tl.range(0, tl.where(some, shared_rows * shared_heads, 0)):
        row = (tl.program_id(1) // bias_heads + step // shared_heads).to(tl.int64)
        head = (tl.program_id(1) % bias_heads + step % shared_heads).to(tl.int64)
        q_tile = load_tile(q + row * q_b + head * q_h, far_q * q_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
        grad_tile = load_tile(grad_out + row * grad_b + head * grad_h, far_q * grad_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
        k_tile = load_tile(k + row * k_b + head // GROUPS * k_h, far_k * k_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
        v_tile = load_tile(v + row * v_b + head // GROUPS * v_h, far_k * v_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
        which = (row * heads + head) * queries + rows
        scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), wide), PRECISION)
        added = tl.load(bias + row * bias_b + head * bias_h + far_q * bias_q + far_k.trans(1, 0) * bias_k).to(wide)
        weights = tl.exp2((scores * SCALE + added) * LOG2_E - tl.load(lse + which)[:, None])
        grad_weights = dot(grad_tile, tl.trans(v_tile), tl.zeros((BLOCK_M, BLOCK_N), wide), PRECISION)
        visible = seen
        if q_marks is not None:
            ids = tl.load(q_marks + row * 4 * queries + rows)
            visible &= ids[:, None] == tl.load(k_marks + row * 4 * keys + others)[None, :]
        acc += tl.where(visible, weights * (grad_weights - tl.load(delta + which)[:, None]), 0.0)
    stored = (tl.program_id(1).to(tl.int64) * queries + at_q)[:, None] * keys + at_k[None, :]
    tl.store(grad_bias + stored, acc.to(grad_bias.dtype.element_ty), mask=(at_q < queries)[:, None] & (at_k < keys)[None, :])


@torch.library.custom_op("trireme::attention_bias_backward", mutates_args=())
def attention_bias_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_marks: Tensor | None,
    k_marks: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    before: int,
    after: int,
    scale: float,
) -> Tensor:
    """The gradient of ``bias``, dense in its shape."""
    grad = bias.new_empty(bias.shape)
    if grad.numel() == 0 or q.numel() == 0:
        return grad.zero_()
    grad_out, q, k, v = (unit_stride(x) for x in (grad_out, q, k, v))
    if cos is not None and sin is not None:
        q, k = turned(q, cos, sin), turned(k, cos, sin)
    tensors = q, k, v, bias, q_marks, k_marks, lse, grad_out, delta, grad
    run = functools.partial(_run, tensors, (before, after, scale))
    run(tuning.best("attention_backward_bias", shape_class(q, k, after, q_marks), _candidates(q), run))
    return grad


@attention_bias_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *others: object) -> Tensor:
    return bias.new_empty(bias.shape)


def _run(tensors: tuple[Tensor | None, ...], options: tuple[int, int, float], chosen: tuning.Tiles) -> None:
    q, k, v, bias, grad_out = (tensors[i] for i in (0, 1, 2, 3, 7))
    assert q is not None and k is not None and v is not None and bias is not None and grad_out is not None
    before, after, scale = options
    rows, queries, heads, _ = q.shape
    keys, groups = k.shape[1], heads // k.shape[2]
    strides = *(n for x in (q, k, v, grad_out) for n in x.stride()[:3]), *bias_strides(bias)
    shared = (n if bias.shape[dim] == 1 else 1 for dim, n in ((0, rows), (1, heads)))
    sizes = queries, keys, heads, bias.shape[1], *shared, before, after
    grid = triton.cdiv(queries, chosen["BLOCK_M"]) * triton.cdiv(keys, chosen["BLOCK_N"]), bias.shape[0] * bias.shape[1]
    launch(_attention_backward_bias_kernel, grid, *tensors, *strides, *sizes, **constants(q, groups, scale), **chosen)


def _candidates(q: Tensor) -> list[tuning.Tiles]:
    return [{"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}]
