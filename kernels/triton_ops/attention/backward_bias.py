"""The gradient of an additive bias of attention: dS summed over the rows and heads that share the bias.

A program owns a tile of the bias's gradient and walks over everything that was broadcast, making the scores again each time
(see ``attention_backward_q``): a sum in one program in a fixed order, so two runs are equal bit for bit, at two products of the
backward's seven. Nothing but the gradient itself is written.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

import kernels.tuning as tuning
from kernels.launch import dot, launch
from kernels.triton_ops.attention.problem import Problem
from kernels.triton_ops.attention.tiles import LOG2_E, columns, load_tile, sees


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
        grad_tile = load_tile(
            grad_out + row * grad_b + head * grad_h, far_q * grad_t + cols[None, :], kept, HEAD_DIM, BLOCK_D
        )
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
    tl.store(
        grad_bias + stored, acc.to(grad_bias.dtype.element_ty), mask=(at_q < queries)[:, None] & (at_k < keys)[None, :]
    )


def run_backward_bias(problem: Problem, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_bias: Tensor) -> None:
    """Writes the gradient of the bias. Queries and keys are turned already."""
    run = functools.partial(_run, problem, lse, grad_out, delta, grad_bias)
    run(tuning.best("attention_backward_bias", problem.shape_class(), _candidates(problem.q), run))


def _run(
    problem: Problem, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_bias: Tensor, chosen: tuning.Tiles
) -> None:
    (rows, queries, heads, _), (bias_rows, bias_heads, _, keys) = problem.q.shape, grad_bias.shape
    shared = rows if bias_rows == 1 else 1, heads if bias_heads == 1 else 1
    sizes = queries, keys, heads, bias_heads, *shared, problem.before, problem.after
    arguments = *problem[:6], lse, grad_out, delta, grad_bias, *problem.strides(grad_out)[:-1], *sizes
    grid = triton.cdiv(queries, chosen["BLOCK_M"]) * triton.cdiv(keys, chosen["BLOCK_N"]), bias_rows * bias_heads
    launch(_attention_backward_bias_kernel, grid, *arguments, **problem.constants(), **chosen)


def _candidates(q: Tensor) -> list[tuning.Tiles]:
    return [{"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}]
