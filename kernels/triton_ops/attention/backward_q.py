"""Backward pass of attention for the queries: dQ = scale * dS K, and delta for the later kernels.

Scores were not kept, so a backward kernel recomputes them from the saved log-sum-exp: P = exp(scores - lse), and dS = P
* (dO V^T - delta) with delta = rowsum(dO * O) (Dao et al. 2022, 2023). A program keeps a block of queries and walks
over the keys that they see, as in the forward pass. Before that it writes delta, and the rotated queries, for the later
kernels.

Every gradient of attention is summed inside one program in a fixed order, without atomic additions: two runs are equal
bit for bit. The cost is that scores are computed once for dQ and once more for dK and dV, seven products instead of
five; in return no gradient passes through memory in float32.

On Hopper, a program takes 128 queries for two warp groups, as in the forward pass, and 64 keys at a time, since it
holds both the scores and their gradients.
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
from kernels.triton_ops.attention.problem import (
    AttentionProblem,
    TileChoice,
    TileRows,
    head_dim_class,
    heads_in_l2,
    run_best_tiles,
    tma_descriptor,
)
from kernels.triton_ops.attention.tiles import (
    LOG2_E,
    head_columns,
    load_rotated,
    load_rows,
    load_tile,
    rotate_back,
    tile_of_program,
    tile_ranges,
    tile_start,
    visible_range,
)

# Candidates (TileChoice) by head dimension.
HALF: TileRows = {
    64: [
        (128, 64, 0, 8, 3, 65, 81, 90),
        (64, 32, 0, 4, 2, 29, None, None),
        (128, 64, 1, 8, 3, None, 82, 90),
        (64, 64, 1, 4, 3, None, 66, 74),
        (128, 128, 1, 8, 2, None, 98, 114),
    ],
    128: [
        (128, 64, 0, 8, 2, None, 129, 146),
        (64, 32, 0, 4, 2, 57, 65, 74),
        (128, 64, 1, 8, 2, None, 129, 146),
        (64, 64, 1, 4, 2, None, 98, 114),
    ],
    256: [
        (64, 32, 0, 8, 2, 113, 129, 146),
        (32, 32, 0, 8, 1, 64, 64, 64),
        (64, 64, 1, 8, 2, None, None, 226),
    ],
}
HALF_BIASED: TileRows = {
    64: [
        (128, 64, 0, 8, 3, None, 81, 90),
        (64, 32, 0, 4, 2, 29, None, None),
        (128, 64, 1, 8, 3, None, 82, None),
        (64, 64, 1, 4, 3, None, 66, None),
        (128, 128, 1, 8, 2, None, 98, None),
    ],
    128: [
        (128, 64, 0, 8, 2, None, 129, 146),
        (64, 32, 0, 4, 2, 57, 65, None),
        (128, 64, 1, 8, 2, None, 129, None),
        (64, 64, 1, 4, 2, None, 98, None),
    ],
    256: [(64, 32, 0, 8, 2, 113, 129, None), (32, 32, 0, 8, 1, 64, 64, 64)],
}
"""Those for layers with a bias, which takes registers in the loop: what spills with one is left out."""
FLOAT32: TileRows = {
    64: [(128, 32, 0, 8, 2, None, 161, None), (32, 32, 0, 4, 2, 57, 57, 57)],
    128: [(16, 32, 0, 4, 2, 69, 69, 69)],
    256: [(16, 16, 0, 8, 1, 80, 80, 80)],
}
FLOAT64: TileRows = {
    64: [(16, 16, 0, 4, 2, 81, 81, 81)],
    128: [(16, 16, 0, 4, 2, 81, 81, 81)],
    256: [(16, 16, 0, 4, 2, 161, 161, 161)],
}


@triton.jit
def _attention_backward_q_kernel(
    q_ptr,  # (B, Tq, H, Dh), before rotary embedding
    k_ptr,  # (B, Tk, Hkv, Dh), rotated; a tensor descriptor with USE_TMA
    v_ptr,  # (B, Tk, Hkv, Dh); a tensor descriptor with USE_TMA
    bias_ptr,  # (B or 1, H or 1, Tq, Tk) or None
    q_bounds_ptr,  # (B, 4, Tq) int32 or None
    k_bounds_ptr,  # (B, 4, Tk) int32 or None
    cos_ptr,  # (B or 1, T, Dh/2) float32 or None
    sin_ptr,  # (B or 1, T, Dh/2) float32 or None
    out_ptr,  # (B, Tq, H, Dh)
    lse_ptr,  # (B, H, Tq)
    grad_out_ptr,  # (B, Tq, H, Dh)
    q_rotated_ptr,  # (B, Tq, H, Dh), written, or None
    delta_ptr,  # (B, H, Tq), written
    grad_q_ptr,  # (B, Tq, H, Dh), written
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    grad_out_batch_stride,
    grad_out_row_stride,
    grad_out_head_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    bias_column_stride,
    cos_batch_stride,
    n_queries,
    n_keys,
    n_heads,
    n_batch_heads,  # B * H
    window_left,
    window_right,
    concurrent_heads,  # (batch, head) pairs whose programs run side by side
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_blocks = (n_queries + BLOCK_M - 1) // BLOCK_M
    block, batch_head = tile_of_program(tl.program_id(0), n_blocks, n_batch_heads, concurrent_heads)
    block = n_blocks - 1 - block  # causal: the last block sees most keys
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(position, n_queries - 1)
    if q_bounds_ptr is not None:
        q_bounds_ptr += batch * 4 * n_queries
        k_bounds_ptr += batch * 4 * n_keys
        q_ids = tl.load(q_bounds_ptr + row)
    start, stop, full_stop = visible_range(
        row, n_keys - n_queries, window_left, window_right, 0, n_keys, q_bounds_ptr, n_queries
    )
    first, full_first, n_full, n_partial = tile_ranges(start, stop, full_stop, BLOCK_N)

    v_columns, v_mask = head_columns(HEAD_DIM, BLOCK_D, False)
    k_columns, k_mask = head_columns(HEAD_DIM, BLOCK_D, cos_ptr is not None)
    out_offset = ((batch * n_queries + position) * n_heads + head)[:, None] * HEAD_DIM
    row64 = row.to(tl.int64)[:, None]
    q_base_ptr = q_ptr + batch * q_batch_stride + head * q_head_stride
    if cos_ptr is None:
        q_tile = load_tile(q_base_ptr, row64 * q_row_stride + k_columns[None, :], k_mask, HEAD_DIM, BLOCK_D)
    else:
        q_tile = load_rotated(
            q_base_ptr,
            row64 * q_row_stride,
            cos_ptr + batch * cos_batch_stride,
            sin_ptr + batch * cos_batch_stride,
            row,
            HEAD_DIM,
            BLOCK_D,
        )
        q_mask = (position < n_queries)[:, None] & k_mask[None, :]
        tl.store(q_rotated_ptr + out_offset + k_columns[None, :], q_tile, mask=q_mask)
    grad_out_tile = load_tile(
        grad_out_ptr + batch * grad_out_batch_stride + head * grad_out_head_stride,
        row64 * grad_out_row_stride + v_columns[None, :],
        v_mask,
        HEAD_DIM,
        BLOCK_D,
    )
    out_row = ((batch * n_queries + row) * n_heads + head)[:, None] * HEAD_DIM
    out_tile = load_tile(out_ptr, out_row + v_columns[None, :], v_mask, HEAD_DIM, BLOCK_D)
    acc_dtype: tl.constexpr = lse_ptr.dtype.element_ty
    delta = tl.sum(out_tile.to(acc_dtype) * grad_out_tile.to(acc_dtype), 1)
    tl.store(delta_ptr + batch_head.to(tl.int64) * n_queries + position, delta, mask=position < n_queries)
    lse = tl.load(lse_ptr + batch_head.to(tl.int64) * n_queries + row)
    kv_head = head // GROUPS

    scale_log2: tl.constexpr = SCALE * LOG2_E if bias_ptr is None else 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_D), acc_dtype)
    for PARTIAL in tl.static_range(2):
        for tile in tl.range(0, n_partial if PARTIAL else n_full):
            k_start = tile_start(tile, PARTIAL, first, full_first, n_full, BLOCK_N)
            k_offset = tl.arange(0, BLOCK_N)
            if PARTIAL:
                k_offset = tl.minimum(k_offset, n_keys - 1 - k_start)
            k_tile = load_rows(
                k_ptr,
                batch,
                kv_head,
                k_start,
                k_offset,
                k_batch_stride,
                k_row_stride,
                k_head_stride,
                k_columns,
                k_mask,
                HEAD_DIM,
                BLOCK_D,
                USE_TMA,
            )
            v_tile = load_rows(
                v_ptr,
                batch,
                kv_head,
                k_start,
                k_offset,
                v_batch_stride,
                v_row_stride,
                v_head_stride,
                v_columns,
                v_mask,
                HEAD_DIM,
                BLOCK_D,
                USE_TMA,
            )
            scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), acc_dtype), PRECISION)
            if bias_ptr is not None:
                offsets = row64 * bias_row_stride + (k_start + k_offset).to(tl.int64)[None, :] * bias_column_stride
                bias_base_ptr = bias_ptr + batch * bias_batch_stride + head * bias_head_stride
                bias = tl.load(bias_base_ptr + offsets).to(acc_dtype)
                scores = (scores * SCALE + bias) * LOG2_E
            probs = tl.exp2(scores * scale_log2 - lse[:, None])
            if PARTIAL:
                k_position = k_start + tl.arange(0, BLOCK_N)
                visible = (k_position[None, :] >= start[:, None]) & (k_position[None, :] < stop[:, None])
                if q_bounds_ptr is not None:
                    visible &= q_ids[:, None] == tl.load(k_bounds_ptr + k_start + k_offset)[None, :]
                probs = tl.where(visible, probs, 0.0)
            grad_probs = dot(grad_out_tile, tl.trans(v_tile), tl.zeros((BLOCK_M, BLOCK_N), acc_dtype), PRECISION)
            grad_scores = probs * (grad_probs - delta[:, None])
            acc = dot(grad_scores.to(k_tile.dtype), k_tile, acc, PRECISION)

    acc *= SCALE
    if cos_ptr is not None:
        acc = rotate_back(acc, cos_ptr + batch * cos_batch_stride, sin_ptr + batch * cos_batch_stride, row, HEAD_DIM)
    grad_mask = (position < n_queries)[:, None] & k_mask[None, :]
    tl.store(grad_q_ptr + out_offset + k_columns[None, :], acc.to(grad_q_ptr.dtype.element_ty), mask=grad_mask)


def run_backward_q(
    problem: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    q_rotated: Tensor | None,
    delta: Tensor,
    grad_q: Tensor,
) -> None:
    """Writes delta (B, H, Tq), the gradient of q, and with rope the rotated q. Keys come rotated already."""
    run = functools.partial(_run, problem, out, lse, grad_out, q_rotated, delta, grad_q)
    run_best_tiles(
        "attention_backward_q", problem, problem[1:3], _tile_choices(problem.q, problem.bias is not None), run
    )


def _run(
    problem: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    q_rotated: Tensor | None,
    delta: Tensor,
    grad_q: Tensor,
    tiles: tuning.Tiles,
) -> None:
    batch_size, n_queries, n_heads, _ = out.shape
    concurrent_heads = heads_in_l2(problem.k) * problem.groups
    windows = problem.window_left, problem.window_right
    sizes = n_queries, problem.k.shape[1], n_heads, batch_size * n_heads, *windows, concurrent_heads
    k: Any = problem.k
    v: Any = problem.v
    if tiles["USE_TMA"]:
        k, v = (tma_descriptor(x, tiles["BLOCK_N"]) for x in (k, v))
    tensors = problem.q, k, v, *problem[3:8], out, lse, grad_out, q_rotated, delta, grad_q
    grid = (triton.cdiv(n_queries, tiles["BLOCK_M"]) * batch_size * n_heads,)
    arguments = *tensors, *problem.strides(grad_out), *sizes
    launch(_attention_backward_q_kernel, grid, *arguments, **problem.constexprs(), **tiles)


def _tile_choices(q: Tensor, biased: bool = False) -> list[TileChoice]:
    """Candidates for the dtype and head dimension of q; the first that fits the device is the untuned default."""
    by_head_dim = {torch.float64: FLOAT64, torch.float32: FLOAT32}.get(q.dtype, HALF_BIASED if biased else HALF)
    return [TileChoice(*row) for row in by_head_dim[head_dim_class(q.shape[3])]]
