"""Backward pass of attention for the keys and values: dV = P^T dO and dK = scale * dS^T Q.

P and dS are explained in ``backward_q``. A program keeps a block of keys of one key head and walks over the queries
that see it, of all query heads of its group, in one loop: their gradients are summed in registers, in a fixed order.

On Hopper, two accumulators of 128 keys take half of the registers of 8 warps at a head dimension of 128, so the queries
come 64 at a time. Scores are computed transposed, so that P^T and dS^T are left operands of wgmma straight from
registers.
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
        (64, 128, 0, 8, 3, 66, 82, 99),
        (32, 64, 0, 8, 2, 25, None, None),
        (64, 128, 1, 8, 3, None, 83, 99),
        (64, 64, 1, 4, 3, None, 67, 83),
        (128, 128, 1, 8, 2, None, 99, None),
    ],
    128: [
        (64, 128, 0, 8, 2, None, 129, 162),
        (32, 64, 0, 8, 2, 53, 65, 82),
        (64, 128, 1, 8, 2, None, 129, 162),
        (32, 128, 1, 8, 3, None, 113, 129),
        (64, 64, 1, 4, 2, None, 98, 131),
    ],
    256: [
        (32, 64, 0, 8, 2, 101, 129, 162),
        (32, 32, 0, 8, 1, 80, 80, 80),
        (32, 64, 1, 8, 2, None, None, 163),
    ],
}
HALF_BIASED: TileRows = {
    64: [
        (64, 128, 0, 8, 3, None, 82, None),
        (32, 64, 0, 8, 2, 25, None, None),
        (64, 64, 0, 8, 2, None, 49, 73),
        (64, 128, 1, 8, 3, None, 83, None),
        (64, 64, 1, 4, 3, None, 67, 83),
    ],
    128: [(64, 64, 0, 8, 2, 65, 98, 131), (32, 64, 0, 8, 2, 53, 65, None), (32, 128, 0, 8, 2, None, 97, None)],
    256: [(32, 32, 0, 8, 1, 80, 80, 80)],
}
"""Those for layers with a bias, which takes registers in the loop: what spills with one is left out."""
FLOAT32: TileRows = {
    64: [(32, 64, 0, 8, 2, None, 97, None), (32, 32, 0, 4, 2, 49, 49, 49)],
    128: [(32, 32, 0, 8, 1, 96, 96, None), (16, 16, 0, 4, 2, 49, 49, 49)],
    256: [(16, 16, 0, 8, 1, 96, 96, 96)],
}
FLOAT32_BIASED: TileRows = FLOAT32 | {128: [(16, 16, 0, 4, 2, 49, 49, 49)]}
FLOAT64: TileRows = {
    64: [(16, 16, 0, 4, 2, 81, 81, 81)],
    128: [(16, 16, 0, 4, 2, 81, 81, 81)],
    256: [(16, 16, 0, 4, 2, 161, 161, 161)],
}


@triton.jit
def _attention_backward_kv_kernel(
    q_ptr,  # (B, Tq, H, Dh), rotated; a tensor descriptor with USE_TMA
    k_ptr,  # (B, Tk, Hkv, Dh), rotated
    v_ptr,  # (B, Tk, Hkv, Dh)
    bias_ptr,  # (B or 1, H or 1, Tq, Tk) or None
    q_bounds_ptr,  # (B, 4, Tq) int32 or None
    k_bounds_ptr,  # (B, 4, Tk) int32 or None
    cos_ptr,  # (B or 1, T, Dh/2) float32 or None
    sin_ptr,  # (B or 1, T, Dh/2) float32 or None
    lse_ptr,  # (B, H, Tq)
    grad_out_ptr,  # (B, Tq, H, Dh); a tensor descriptor with USE_TMA
    delta_ptr,  # (B, H, Tq)
    grad_k_ptr,  # (B, Tk, Hkv, Dh), written
    grad_v_ptr,  # (B, Tk, Hkv, Dh), written
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
    n_heads,  # Hkv
    n_batch_heads,  # B * Hkv
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
    n_blocks = (n_keys + BLOCK_N - 1) // BLOCK_N
    block, batch_head = tile_of_program(  # causal: the first block is seen by most queries
        tl.program_id(0), n_blocks, n_batch_heads, concurrent_heads
    )
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    position = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(position, n_keys - 1)
    if q_bounds_ptr is not None:
        q_bounds_ptr += batch * 4 * n_queries
        k_bounds_ptr += batch * 4 * n_keys
        k_ids = tl.load(k_bounds_ptr + row)
    # The queries that see these keys: the band of the forward pass, transposed, so the window's sides are swapped.
    start, stop, full_stop = visible_range(
        row, n_queries - n_keys, window_right, window_left, 0, n_queries, k_bounds_ptr, n_keys
    )
    first, full_first, n_full, n_partial = tile_ranges(start, stop, full_stop, BLOCK_M)

    v_columns, v_mask = head_columns(HEAD_DIM, BLOCK_D, False)
    k_columns, k_mask = head_columns(HEAD_DIM, BLOCK_D, cos_ptr is not None)
    row64 = row.to(tl.int64)[:, None]
    k_base_ptr = k_ptr + batch * k_batch_stride + head * k_head_stride
    v_base_ptr = v_ptr + batch * v_batch_stride + head * v_head_stride
    k_tile = load_tile(k_base_ptr, row64 * k_row_stride + k_columns[None, :], k_mask, HEAD_DIM, BLOCK_D)
    v_tile = load_tile(v_base_ptr, row64 * v_row_stride + v_columns[None, :], v_mask, HEAD_DIM, BLOCK_D)

    acc_dtype: tl.constexpr = lse_ptr.dtype.element_ty
    scale_log2: tl.constexpr = SCALE * LOG2_E if bias_ptr is None else 1.0
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), acc_dtype)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), acc_dtype)
    for PARTIAL in tl.static_range(2):
        n_tiles = n_partial if PARTIAL else n_full
        for step in tl.range(0, n_tiles * GROUPS):  # one loop over tiles and heads keeps the copy pipeline full
            q_head = head * GROUPS + step % GROUPS
            q_start = tile_start(step // GROUPS, PARTIAL, first, full_first, n_full, BLOCK_M)
            q_offset = tl.arange(0, BLOCK_M)
            if PARTIAL:
                q_offset = tl.minimum(q_offset, n_queries - 1 - q_start)
            q_tile = load_rows(
                q_ptr,
                batch,
                q_head,
                q_start,
                q_offset,
                q_batch_stride,
                q_row_stride,
                q_head_stride,
                k_columns,
                k_mask,
                HEAD_DIM,
                BLOCK_D,
                USE_TMA,
            )
            grad_out_tile = load_rows(
                grad_out_ptr,
                batch,
                q_head,
                q_start,
                q_offset,
                grad_out_batch_stride,
                grad_out_row_stride,
                grad_out_head_stride,
                v_columns,
                v_mask,
                HEAD_DIM,
                BLOCK_D,
                USE_TMA,
            )
            lse_index = (batch * n_heads * GROUPS + q_head) * n_queries + q_start + q_offset
            scores = dot(k_tile, tl.trans(q_tile), tl.zeros((BLOCK_N, BLOCK_M), acc_dtype), PRECISION)
            if bias_ptr is not None:
                offsets = row64 * bias_column_stride + (q_start + q_offset).to(tl.int64)[None, :] * bias_row_stride
                bias_base_ptr = bias_ptr + batch * bias_batch_stride + q_head * bias_head_stride
                bias = tl.load(bias_base_ptr + offsets).to(acc_dtype)
                scores = (scores * SCALE + bias) * LOG2_E
            probs = tl.exp2(scores * scale_log2 - tl.load(lse_ptr + lse_index)[None, :])
            if PARTIAL:
                q_position = q_start + tl.arange(0, BLOCK_M)
                visible = (q_position[None, :] >= start[:, None]) & (q_position[None, :] < stop[:, None])
                if q_bounds_ptr is not None:
                    visible &= k_ids[:, None] == tl.load(q_bounds_ptr + q_start + q_offset)[None, :]
                probs = tl.where(visible, probs, 0.0)
            acc_v = dot(probs.to(grad_out_tile.dtype), grad_out_tile, acc_v, PRECISION)
            grad_probs = dot(v_tile, tl.trans(grad_out_tile), tl.zeros((BLOCK_N, BLOCK_M), acc_dtype), PRECISION)
            grad_scores = probs * (grad_probs - tl.load(delta_ptr + lse_index)[None, :])
            acc_k = dot(grad_scores.to(q_tile.dtype), q_tile, acc_k, PRECISION)

    acc_k *= SCALE
    if cos_ptr is not None:
        acc_k = rotate_back(
            acc_k, cos_ptr + batch * cos_batch_stride, sin_ptr + batch * cos_batch_stride, row, HEAD_DIM
        )
    out_offset = ((batch * n_keys + position) * n_heads + head)[:, None] * HEAD_DIM
    grad_k_tile_ptr = grad_k_ptr + out_offset + k_columns[None, :]
    grad_v_tile_ptr = grad_v_ptr + out_offset + v_columns[None, :]
    row_mask = (position < n_keys)[:, None]
    tl.store(grad_k_tile_ptr, acc_k.to(grad_k_ptr.dtype.element_ty), mask=row_mask & k_mask[None, :])
    tl.store(grad_v_tile_ptr, acc_v.to(grad_v_ptr.dtype.element_ty), mask=row_mask & v_mask[None, :])


def run_backward_kv(
    problem: AttentionProblem, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Writes the gradients of k and v (B, Tk, Hkv, Dh). Queries and keys come rotated already."""
    run = functools.partial(_run, problem, lse, grad_out, delta, grad_k, grad_v)
    run_best_tiles(
        "attention_backward_kv", problem, (problem.q, grad_out), _tile_choices(problem.q, problem.bias is not None), run
    )


def _run(
    problem: AttentionProblem,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    tiles: tuning.Tiles,
) -> None:
    batch_size, n_keys, n_heads, _ = grad_k.shape
    concurrent_heads = max(1, heads_in_l2(problem.q) // problem.groups)
    windows = problem.window_left, problem.window_right
    sizes = problem.q.shape[1], n_keys, n_heads, batch_size * n_heads, *windows, concurrent_heads
    q: Any = problem.q
    grad: Any = grad_out
    if tiles["USE_TMA"]:
        q, grad = (tma_descriptor(x, tiles["BLOCK_M"]) for x in (q, grad))
    tensors = q, *problem[1:8], lse, grad, delta, grad_k, grad_v
    grid = (triton.cdiv(n_keys, tiles["BLOCK_N"]) * batch_size * n_heads,)
    arguments = *tensors, *problem.strides(grad_out), *sizes
    launch(_attention_backward_kv_kernel, grid, *arguments, **problem.constexprs(), **tiles)


def _tile_choices(q: Tensor, biased: bool = False) -> list[TileChoice]:
    """Candidates for the dtype and head dimension of q; the first that fits the device is the untuned default."""
    half, full = (HALF_BIASED, FLOAT32_BIASED) if biased else (HALF, FLOAT32)
    by_head_dim = {torch.float64: FLOAT64, torch.float32: full}.get(q.dtype, half)
    return [TileChoice(*row) for row in by_head_dim[head_dim_class(q.shape[3])]]
