"""The backward pass of attention for the keys and values: dV = P^T dO and dK = scale * dS^T Q (see ``attention_backward_q``).

A program owns a block of keys of one key head and walks over the queries that see it, of all query heads of its group, in one
loop: their gradients are summed in registers, in a fixed order.

On Hopper: two accumulators of 128 keys take half of the registers of 8 warps at a head dimension of 128, so the queries come 64
at a time. Scores are made transposed, so that P^T and dS^T are the left operands of wgmma straight from registers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.tuning as tuning
from kernels.launch import dot, launch
from kernels.triton_ops.attention.problem import Choice, Problem, boxed, rounded, run_best, side_by_side
from kernels.triton_ops.attention.tiles import (
    LOG2_E,
    columns,
    load_rows,
    load_tile,
    place,
    sees,
    tile_at,
    tiles,
    turn_back,
)


@triton.jit
def _attention_backward_kv_kernel(
    q,  # (B, Tq, H, Dh), turned
    k,  # (B, Tk, Hkv, Dh), turned
    v,  # (B, Tk, Hkv, Dh)
    bias,  # (B or 1, H or 1, Tq, Tk) or None
    q_marks,  # (B, 4, Tq) int32 or None
    k_marks,  # (B, 4, Tk) int32 or None
    cos,  # (B or 1, T, Dh/2) float32 or None
    sin,
    lse,  # (B, H, Tq)
    grad_out,  # (B, Tq, H, Dh)
    delta,  # (B, H, Tq)
    grad_k,  # (B, Tk, Hkv, Dh), written
    grad_v,  # (B, Tk, Hkv, Dh), written
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
    cos_b,
    queries,
    keys,
    heads,  # Hkv
    pairs,  # B * Hkv
    before,
    after,
    beside,  # pairs whose programs run side by side
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOXES: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = (keys + BLOCK_N - 1) // BLOCK_N
    block, pair = place(tl.program_id(0), blocks, pairs, beside)  # causal: the first is seen by most
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(at, keys - 1)
    if q_marks is not None:
        q_marks += row * 4 * queries
        k_marks += row * 4 * keys
        ids = tl.load(k_marks + rows)
    # Which queries see these keys: the forward band, looked at from the other side.
    start, stop, whole_stop = sees(rows, queries - keys, after, before, 0, queries, k_marks, keys)
    begin, whole_begin, whole, edges = tiles(start, stop, whole_stop, BLOCK_M)

    plain, plain_kept = columns(HEAD_DIM, BLOCK_D, False)
    cols, kept = columns(HEAD_DIM, BLOCK_D, cos is not None)
    far = rows.to(tl.int64)[:, None]
    k_tile = load_tile(k + row * k_b + head * k_h, far * k_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
    v_tile = load_tile(v + row * v_b + head * v_h, far * v_t + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D)

    wide: tl.constexpr = lse.dtype.element_ty
    unit: tl.constexpr = SCALE * LOG2_E if bias is None else 1.0
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), wide)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), wide)
    for EDGE in tl.static_range(2):
        count = edges if EDGE else whole
        for step in tl.range(0, count * GROUPS):  # one loop over tiles and heads, so that the copies never run dry
            q_head = head * GROUPS + step % GROUPS
            first = tile_at(step // GROUPS, EDGE, begin, whole_begin, whole, BLOCK_M)
            inside = tl.arange(0, BLOCK_M)
            if EDGE:
                inside = tl.minimum(inside, queries - 1 - first)
            q_tile = load_rows(q, row, q_head, first, inside, q_b, q_t, q_h, cols, kept, HEAD_DIM, BLOCK_D, BOXES)
            grad_tile = load_rows(
                grad_out,
                row,
                q_head,
                first,
                inside,
                grad_b,
                grad_t,
                grad_h,
                plain,
                plain_kept,
                HEAD_DIM,
                BLOCK_D,
                BOXES,
            )
            which = (row * heads * GROUPS + q_head) * queries + first + inside
            scores = dot(k_tile, tl.trans(q_tile), tl.zeros((BLOCK_N, BLOCK_M), wide), PRECISION)
            if bias is not None:
                offsets = far * bias_k + (first + inside).to(tl.int64)[None, :] * bias_q
                added = tl.load(bias + row * bias_b + q_head * bias_h + offsets).to(wide)
                scores = (scores * SCALE + added) * LOG2_E
            weights = tl.exp2(scores * unit - tl.load(lse + which)[None, :])
            if EDGE:
                places = first + tl.arange(0, BLOCK_M)
                seen = (places[None, :] >= start[:, None]) & (places[None, :] < stop[:, None])
                if q_marks is not None:
                    seen &= ids[:, None] == tl.load(q_marks + first + inside)[None, :]
                weights = tl.where(seen, weights, 0.0)
            acc_v = dot(weights.to(grad_tile.dtype), grad_tile, acc_v, PRECISION)
            grad_weights = dot(v_tile, tl.trans(grad_tile), tl.zeros((BLOCK_N, BLOCK_M), wide), PRECISION)
            grad_scores = weights * (grad_weights - tl.load(delta + which)[None, :])
            acc_k = dot(grad_scores.to(q_tile.dtype), q_tile, acc_k, PRECISION)

    acc_k *= SCALE
    if cos is not None:
        acc_k = turn_back(acc_k, cos + row * cos_b, sin + row * cos_b, rows, HEAD_DIM)
    stored = ((row * keys + at) * heads + head)[:, None] * HEAD_DIM
    inner = (at < keys)[:, None]
    tl.store(grad_k + stored + cols[None, :], acc_k.to(grad_k.dtype.element_ty), mask=inner & kept[None, :])
    tl.store(grad_v + stored + plain[None, :], acc_v.to(grad_v.dtype.element_ty), mask=inner & plain_kept[None, :])


def run_backward_kv(
    problem: Problem, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Writes the gradients of k and v. Queries and keys are turned already."""
    run = functools.partial(_run, problem, lse, grad_out, delta, grad_k, grad_v)
    run_best("attention_backward_kv", problem, (problem.q, grad_out), _choices(problem.q), run)


def _run(
    problem: Problem, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_k: Tensor, grad_v: Tensor, chosen: tuning.Tiles
) -> None:
    rows, keys, heads, _ = grad_k.shape
    beside = max(1, side_by_side(problem.q) // problem.groups)
    sizes = problem.q.shape[1], keys, heads, rows * heads, problem.before, problem.after, beside
    q: Any = problem.q
    grad: Any = grad_out
    if chosen["BOXES"]:
        q, grad = (boxed(x, chosen["BLOCK_M"]) for x in (q, grad))
    tensors = q, *problem[1:8], lse, grad, delta, grad_k, grad_v
    grid = (triton.cdiv(keys, chosen["BLOCK_N"]) * rows * heads,)
    launch(
        _attention_backward_kv_kernel,
        grid,
        *tensors,
        *problem.strides(grad_out),
        *sizes,
        **problem.constants(),
        **chosen,
    )


def _choices(q: Tensor) -> list[Choice]:
    if q.dtype == torch.float64:
        return [(32, 32, 0, 8, 1)] if q.shape[3] <= 128 else [(16, 16, 0, 8, 1)]
    if q.dtype == torch.float32:
        return {64: [(32, 128, 0, 8, 2)], 128: [(32, 64, 0, 8, 2)], 256: [(16, 16, 0, 8, 1)]}[rounded(q.shape[3])]
    return {
        64: [(64, 128, 0, 8, 3), (64, 128, 1, 8, 3), (64, 64, 1, 4, 3), (128, 128, 1, 8, 2)],
        128: [(64, 128, 0, 8, 2), (64, 128, 1, 8, 2), (32, 128, 1, 8, 3), (64, 64, 1, 4, 2)],
        256: [(32, 64, 0, 8, 2), (32, 64, 1, 8, 2)],
    }[rounded(q.shape[3])]
