"""The backward pass of attention for the queries: dQ = scale * dS K, and what the other gradients need of each row.

No score was kept, so a backward kernel makes its own again from the saved log-sums: P = exp(scores - log-sum), and
dS = P * (dO V^T - delta) with delta = rowsum(dO * O) (Dao et al. 2022, 2023). A program owns a block of queries and walks over
the keys that they see, as forward; first it makes delta, and the queries in rotary embedding, for the kernels after it.

Every gradient of attention is summed inside one program in a fixed order, without atomic additions: two runs are equal bit for
bit. The price is that scores are made once for dQ and once for dK and dV, 7 products for 5; what it buys besides is that no
gradient passes through memory in float32.

On Hopper: 128 queries for two warp groups as forward, and 64 keys at a time, since scores and their gradients are both held.
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
    load_turned,
    place,
    sees,
    tile_at,
    tiles,
    turn_back,
)


@triton.jit
def _attention_backward_q_kernel(
    q,  # (B, Tq, H, Dh)
    k,  # (B, Tk, Hkv, Dh), turned
    v,  # (B, Tk, Hkv, Dh)
    bias,  # (B or 1, H or 1, Tq, Tk) or None
    q_marks,  # (B, 4, Tq) int32 or None
    k_marks,  # (B, 4, Tk) int32 or None
    cos,  # (B or 1, T, Dh/2) float32 or None
    sin,
    out,  # (B, Tq, H, Dh)
    lse,  # (B, H, Tq)
    grad_out,  # (B, Tq, H, Dh)
    q_turned,  # (B, Tq, H, Dh), written, or None
    delta,  # (B, H, Tq), written
    grad_q,  # (B, Tq, H, Dh), written
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
    heads,
    pairs,  # B * H
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
    blocks = (queries + BLOCK_M - 1) // BLOCK_M
    block, pair = place(tl.program_id(0), blocks, pairs, beside)
    block = blocks - 1 - block
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    at = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(at, queries - 1)
    if q_marks is not None:
        q_marks += row * 4 * queries
        k_marks += row * 4 * keys
        ids = tl.load(q_marks + rows)
    start, stop, whole_stop = sees(rows, keys - queries, before, after, 0, keys, q_marks, queries)
    begin, whole_begin, whole, edges = tiles(start, stop, whole_stop, BLOCK_N)

    plain, plain_kept = columns(HEAD_DIM, BLOCK_D, False)
    cols, kept = columns(HEAD_DIM, BLOCK_D, cos is not None)
    stored = ((row * queries + at) * heads + head)[:, None] * HEAD_DIM
    far = rows.to(tl.int64)[:, None]
    if cos is None:
        q_tile = load_tile(q + row * q_b + head * q_h, far * q_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
    else:
        q_tile = load_turned(
            q + row * q_b + head * q_h, far * q_t, cos + row * cos_b, sin + row * cos_b, rows, HEAD_DIM, BLOCK_D
        )
        tl.store(q_turned + stored + cols[None, :], q_tile, mask=(at < queries)[:, None] & kept[None, :])
    grad_tile = load_tile(
        grad_out + row * grad_b + head * grad_h, far * grad_t + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D
    )
    place_out = ((row * queries + rows) * heads + head)[:, None] * HEAD_DIM
    out_tile = load_tile(out, place_out + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D)
    wide: tl.constexpr = lse.dtype.element_ty
    slope = tl.sum(out_tile.to(wide) * grad_tile.to(wide), 1)
    tl.store(delta + pair.to(tl.int64) * queries + at, slope, mask=at < queries)
    sums = tl.load(lse + pair.to(tl.int64) * queries + rows)
    kv_head = head // GROUPS

    unit: tl.constexpr = SCALE * LOG2_E if bias is None else 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_D), wide)
    for EDGE in tl.static_range(2):
        for number in tl.range(0, edges if EDGE else whole):
            first = tile_at(number, EDGE, begin, whole_begin, whole, BLOCK_N)
            inside = tl.arange(0, BLOCK_N)
            if EDGE:
                inside = tl.minimum(inside, keys - 1 - first)
            k_tile = load_rows(k, row, kv_head, first, inside, k_b, k_t, k_h, cols, kept, HEAD_DIM, BLOCK_D, BOXES)
            v_tile = load_rows(
                v, row, kv_head, first, inside, v_b, v_t, v_h, plain, plain_kept, HEAD_DIM, BLOCK_D, BOXES
            )
            scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), wide), PRECISION)
            if bias is not None:
                offsets = far * bias_q + (first + inside).to(tl.int64)[None, :] * bias_k
                added = tl.load(bias + row * bias_b + head * bias_h + offsets).to(wide)
                scores = (scores * SCALE + added) * LOG2_E
            weights = tl.exp2(scores * unit - sums[:, None])
            if EDGE:
                places = first + tl.arange(0, BLOCK_N)
                seen = (places[None, :] >= start[:, None]) & (places[None, :] < stop[:, None])
                if q_marks is not None:
                    seen &= ids[:, None] == tl.load(k_marks + first + inside)[None, :]
                weights = tl.where(seen, weights, 0.0)
            grad_weights = dot(grad_tile, tl.trans(v_tile), tl.zeros((BLOCK_M, BLOCK_N), wide), PRECISION)
            grad_scores = weights * (grad_weights - slope[:, None])
            acc = dot(grad_scores.to(k_tile.dtype), k_tile, acc, PRECISION)

    acc *= SCALE
    if cos is not None:
        acc = turn_back(acc, cos + row * cos_b, sin + row * cos_b, rows, HEAD_DIM)
    tl.store(
        grad_q + stored + cols[None, :], acc.to(grad_q.dtype.element_ty), mask=(at < queries)[:, None] & kept[None, :]
    )


def run_backward_q(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, q_turned: Tensor | None, delta: Tensor, grad_q: Tensor
) -> None:
    """Writes delta (B, H, Tq), the gradient of q, and where there is rope q turned. Keys are turned already."""
    run = functools.partial(_run, problem, out, lse, grad_out, q_turned, delta, grad_q)
    run_best("attention_backward_q", problem, problem[1:3], _choices(problem.q), run)


def _run(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    q_turned: Tensor | None,
    delta: Tensor,
    grad_q: Tensor,
    chosen: tuning.Tiles,
) -> None:
    rows, queries, heads, _ = out.shape
    heads_beside = side_by_side(problem.k) * problem.groups
    sizes = queries, problem.k.shape[1], heads, rows * heads, problem.before, problem.after, heads_beside
    k: Any = problem.k
    v: Any = problem.v
    if chosen["BOXES"]:
        k, v = (boxed(x, chosen["BLOCK_N"]) for x in (k, v))
    tensors = problem.q, k, v, *problem[3:8], out, lse, grad_out, q_turned, delta, grad_q
    grid = (triton.cdiv(queries, chosen["BLOCK_M"]) * rows * heads,)
    launch(
        _attention_backward_q_kernel,
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
        return {64: [(128, 32, 0, 8, 2)], 128: [(64, 16, 0, 4, 2)], 256: [(16, 16, 0, 8, 1)]}[rounded(q.shape[3])]
    return {
        64: [(128, 64, 0, 8, 3), (128, 64, 1, 8, 3), (64, 64, 1, 4, 3), (128, 128, 1, 8, 2)],
        128: [(128, 64, 0, 8, 2), (128, 64, 1, 8, 2), (64, 64, 1, 4, 2)],
        256: [(64, 32, 0, 8, 2), (64, 64, 1, 8, 2)],
    }[rounded(q.shape[3])]
