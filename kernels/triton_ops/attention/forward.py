"""Forward pass of attention with an online softmax (FlashAttention; Dao et al. 2022, 2023).

A program keeps BLOCK_M queries of one head in registers and reads the keys and values tile by tile. It holds the
running maximum and sum of the scores and the output, which is rescaled when the maximum grows (Milakov and Gimelshein
2018). Scores never reach memory; the backward pass reads the log-sum-exp of each row, in base 2.

The grid covers query blocks, batch rows and heads. Where these are few (decoding), the keys are split over programs as
well, and a second kernel merges the parts in a fixed order ("Flash-Decoding", Dao et al. 2023).

On Hopper, a tile of 128 queries gives each of two warp groups a wgmma of 64 rows, whose left operand (queries) and
accumulators stay in registers; keys and values stream through shared memory by asynchronous copies, num_stages tiles
deep. The loop over full tiles, nearly all of the work on long rows, has no comparison in it. log2(e) is folded into the
scale, so the exponential is one instruction and the scaling one fused multiply-add.
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
    padded_head_dim,
    run_best_tiles,
    tma_descriptor,
)
from kernels.triton_ops.attention.tiles import (
    LOG2_E,
    head_columns,
    load_rotated,
    load_rows,
    load_tile,
    tile_of_program,
    tile_ranges,
    tile_start,
    visible_range,
)

TARGET_PROGRAMS = 264
"""Two per multiprocessor of an H100 or H200: with fewer, the keys are split."""

# Candidates (TileChoice) by head dimension.
HALF: TileRows = {
    64: [
        (128, 64, 0, 8, 3, 49, 65, 66),
        (128, 128, 1, 8, 2, None, 81, 82),
        (128, 64, 1, 8, 3, None, 65, 66),
        (64, 64, 1, 4, 3, None, 57, 58),
        (128, 64, 1, 4, 3, None, 65, 66),
    ],
    128: [
        (128, 128, 0, 8, 2, None, 161, None),
        (128, 64, 0, 8, 2, 65, 97, 97),
        (128, 128, 1, 8, 2, None, 161, 162),
        (128, 64, 1, 8, 3, None, 129, 131),
        (64, 64, 1, 4, 3, None, 113, 114),
        (64, 128, 1, 4, 2, None, 145, 146),
    ],
    256: [
        (128, 32, 0, 8, 2, None, 129, None),
        (64, 32, 0, 8, 1, 52, 49, 49),
        (128, 64, 1, 8, 2, None, 193, 193),
        (64, 32, 1, 4, 2, None, 97, 97),
    ],
}
HALF_BIASED: TileRows = {
    64: [
        (128, 64, 0, 8, 3, 49, 65, 66),
        (128, 128, 1, 8, 2, None, 81, None),
        (128, 64, 1, 8, 3, None, 65, None),
        (64, 64, 1, 4, 3, None, 57, None),
        (128, 64, 1, 4, 3, None, 65, None),
    ],
    128: [
        (128, 64, 0, 8, 2, 65, 97, 97),
        (128, 128, 1, 8, 2, None, 161, None),
        (128, 64, 1, 8, 3, None, 129, None),
        (64, 64, 1, 4, 3, None, 113, None),
        (64, 128, 1, 4, 2, None, 145, None),
    ],
    256: [
        (128, 32, 0, 8, 2, None, 129, None),
        (64, 32, 0, 8, 1, 52, 49, 49),
        (128, 64, 1, 8, 2, None, 193, None),
        (64, 32, 1, 4, 2, None, 97, None),
    ],
}
"""Those for layers with a bias, which takes registers in the loop: what spills with one is left out."""
HALF_SPECIALIZED: TileRows = {
    64: [(128, 64, 1, 8, 3, None, None, 67)],
    128: [(128, 64, 1, 8, 3, None, None, 131)],
}
"""Candidates with warps for loads, for products and for the softmax each, as Triton 3.7 makes them for tcgen05 only.

For wgmma it ignores the wish with 8 warps and fails with 4.
"""
FLOAT32: TileRows = {
    64: [(128, 64, 0, 8, 2, None, 129, None), (128, 32, 0, 8, 2, 81, 97, None), (32, 32, 0, 4, 2, 41, 41, 41)],
    128: [(32, 32, 0, 8, 1, 48, 48, 48), (16, 32, 0, 4, 2, 53, 53, 53)],
    256: [(16, 16, 0, 8, 2, 67, 67, 67)],
}
FLOAT64: TileRows = {
    64: [(16, 16, 0, 4, 2, 51, 51, 51)],
    128: [(16, 16, 0, 4, 2, 51, 51, 51)],
    256: [(16, 16, 0, 4, 2, 99, 99, 99)],
}
DECODING: TileRows = {
    64: [(16, 64, 0, 4, 3, 37, 37, 37), (16, 128, 0, 4, 3, 71, 71, 71)],
    128: [(16, 64, 0, 4, 3, 71, 71, 71), (16, 128, 0, 4, 3, 137, 137, 137)],
    256: [(16, 32, 0, 4, 2, 42, 42, 42)],
}
DECODING_FLOAT32: TileRows = {
    64: [(16, 32, 0, 4, 2, 29, 29, 29)],
    128: [(16, 32, 0, 4, 2, 53, 53, 53)],
    256: [(16, 16, 0, 8, 2, 67, 67, 67)],
}


@triton.jit
def _attention_forward_kernel(
    q_ptr,  # (B, Tq, H, Dh), before rotary embedding
    k_ptr,  # (B, Tk, Hkv, Dh), rotated; a tensor descriptor with USE_TMA
    v_ptr,  # (B, Tk, Hkv, Dh); a tensor descriptor with USE_TMA
    bias_ptr,  # (B or 1, H or 1, Tq, Tk) or None
    q_bounds_ptr,  # (B, 4, Tq) int32 or None
    k_bounds_ptr,  # (B, 4, Tk) int32 or None
    cos_ptr,  # (B or 1, T, Dh/2) float32 or None
    sin_ptr,  # (B or 1, T, Dh/2) float32 or None
    out_ptr,  # (S, B, Tq, H, Dh), written; S splits of the keys
    lse_ptr,  # (S, B, H, Tq), written, base 2; inf where a query sees no key
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
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
    keys_per_split,  # a multiple of BLOCK_N
    concurrent_heads,  # (batch, head) pairs whose programs run side by side
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr = 0,
):
    # Queries of this program and what they see. Rows past the end repeat the last query and are not stored.
    n_blocks = (n_queries + BLOCK_M - 1) // BLOCK_M
    block, batch_head = tile_of_program(tl.program_id(0), n_blocks, n_batch_heads, concurrent_heads)
    block = n_blocks - 1 - block  # causal: the last block sees most keys
    split = tl.program_id(1).to(tl.int64)
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(position, n_queries - 1)
    if q_bounds_ptr is not None:
        q_bounds_ptr += batch * 4 * n_queries
        k_bounds_ptr += batch * 4 * n_keys
        q_ids = tl.load(q_bounds_ptr + row)
    low = tl.program_id(1) * keys_per_split
    high = tl.minimum(low + keys_per_split, n_keys)
    start, stop, full_stop = visible_range(
        row, n_keys - n_queries, window_left, window_right, low, high, q_bounds_ptr, n_queries
    )
    first, full_first, n_full, n_partial = tile_ranges(start, stop, full_stop, BLOCK_N)

    v_columns, v_mask = head_columns(HEAD_DIM, BLOCK_D, False)
    k_columns, k_mask = head_columns(HEAD_DIM, BLOCK_D, cos_ptr is not None)
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
    kv_head = head // GROUPS

    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale_log2: tl.constexpr = SCALE * LOG2_E if bias_ptr is None else 1.0  # factor of a score in the exponent of 2
    row_max = tl.full((BLOCK_M,), float("-inf"), acc_dtype)
    row_sum = tl.zeros((BLOCK_M,), acc_dtype)
    acc = tl.zeros((BLOCK_M, BLOCK_D), acc_dtype)
    for PARTIAL in tl.static_range(2):
        for tile in tl.range(0, n_partial if PARTIAL else n_full, warp_specialize=WARP_SPECIALIZE):
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
            scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), acc_dtype), PRECISION)
            if bias_ptr is not None:
                offsets = row64 * bias_row_stride + (k_start + k_offset).to(tl.int64)[None, :] * bias_column_stride
                bias_base_ptr = bias_ptr + batch * bias_batch_stride + head * bias_head_stride
                bias = tl.load(bias_base_ptr + offsets).to(acc_dtype)
                scores = (scores * SCALE + bias) * LOG2_E
            if PARTIAL:
                k_position = k_start + tl.arange(0, BLOCK_N)
                visible = (k_position[None, :] >= start[:, None]) & (k_position[None, :] < stop[:, None])
                if q_bounds_ptr is not None:
                    visible &= q_ids[:, None] == tl.load(k_bounds_ptr + k_start + k_offset)[None, :]
                scores = tl.where(visible, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf while no key was visible
            probs = tl.exp2(scores * scale_log2 - finite_max[:, None])
            rescale = tl.exp2(row_max - finite_max)
            row_sum = row_sum * rescale + tl.sum(probs, 1)
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
            acc = dot(probs.to(v_tile.dtype), v_tile, acc * rescale[:, None], PRECISION)
            row_max = new_max

    is_empty = row_sum == 0
    acc = acc / tl.where(is_empty, 1.0, row_sum)[:, None]
    out_row = (split * (n_batch_heads // n_heads) + batch) * n_queries + position
    tl.store(
        out_ptr + (out_row * n_heads + head)[:, None] * HEAD_DIM + v_columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(position < n_queries)[:, None] & v_mask[None, :],
    )
    lse = tl.where(is_empty, float("inf"), row_max + tl.log2(tl.where(is_empty, 1.0, row_sum)))
    tl.store(lse_ptr + (split * n_batch_heads + batch_head) * n_queries + position, lse, mask=position < n_queries)


@triton.jit
def _attention_merge_kernel(
    split_out_ptr,  # (S, B, Tq, H, Dh)
    split_lse_ptr,  # (S, B, H, Tq)
    out_ptr,  # (B, Tq, H, Dh), written
    lse_ptr,  # (B, H, Tq), written
    n_splits,
    n_queries,
    n_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    index, n_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)  # of B * Tq * H
    batch, query, head = index // (n_queries * n_heads), index // n_heads % n_queries, index % n_heads
    lse_index = (batch * n_heads + head) * n_queries + query
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    split64 = split.to(tl.int64)
    lse = tl.load(split_lse_ptr + split64 * n_rows + lse_index, mask=split < n_splits, other=float("inf"))
    lse = tl.where(lse == float("inf"), float("-inf"), lse)
    max_lse = tl.max(lse, 0)
    is_empty = max_lse == float("-inf")
    weights = tl.exp2(lse - tl.where(is_empty, 0.0, max_lse))
    weight_sum = tl.where(is_empty, 1.0, tl.sum(weights, 0))
    mask = (split < n_splits)[:, None] & (column < HEAD_DIM)[None, :]
    offsets = (split64 * n_rows + index)[:, None] * HEAD_DIM + column[None, :]
    tile = tl.load(split_out_ptr + offsets, mask=mask, other=0.0)
    merged = tl.sum(tile * weights[:, None], 0) / weight_sum
    tl.store(out_ptr + index * HEAD_DIM + column, merged.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)
    tl.store(lse_ptr + lse_index, tl.where(is_empty, float("inf"), max_lse + tl.log2(weight_sum)))


def run_forward(problem: AttentionProblem, out: Tensor, lse: Tensor) -> None:
    """Writes the output (B, Tq, H, Dh) and the log-sum-exp (B, H, Tq). Keys come rotated already, queries do not."""
    run = functools.partial(_run, problem, out, lse)
    run_best_tiles("attention_forward", problem, problem[1:3], _tile_choices(problem.q, problem.bias is not None), run)


def _run(problem: AttentionProblem, out: Tensor, lse: Tensor, tiles: tuning.Tiles) -> None:
    (batch_size, n_queries, n_heads, head_dim), n_keys = out.shape, problem.k.shape[1]
    n_programs = triton.cdiv(n_queries, tiles["BLOCK_M"]) * batch_size * n_heads
    n_splits = _split_count(n_programs, n_queries, n_keys, tiles)
    keys_per_split = triton.cdiv(triton.cdiv(n_keys, n_splits), tiles["BLOCK_N"]) * tiles["BLOCK_N"]
    split_out, split_lse = out, lse
    if n_splits > 1:
        split_out, split_lse = (lse.new_empty((n_splits, *x.shape)) for x in (out, lse))
    concurrent_heads = heads_in_l2(problem.k) * problem.groups
    windows = problem.window_left, problem.window_right
    sizes = n_queries, n_keys, n_heads, batch_size * n_heads, *windows, keys_per_split, concurrent_heads
    k: Any = problem.k
    v: Any = problem.v
    if tiles["USE_TMA"]:
        k, v = (tma_descriptor(x, tiles["BLOCK_N"]) for x in (k, v))
    arguments = problem.q, k, v, *problem[3:8], split_out, split_lse, *problem.strides(), *sizes
    launch(_attention_forward_kernel, (n_programs, n_splits), *arguments, **problem.constexprs(), **tiles)
    if n_splits > 1:
        block_s = triton.next_power_of_2(n_splits)
        dims = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "BLOCK_S": block_s}
        grid = (batch_size * n_queries * n_heads,)
        tensors = split_out, split_lse, out, lse
        launch(_attention_merge_kernel, grid, *tensors, n_splits, n_queries, n_heads, **dims, num_warps=4)


def _split_count(n_programs: int, n_queries: int, n_keys: int, tiles: tuning.Tiles) -> int:
    """Parts that the keys are split into: more than one where a single block of queries leaves multiprocessors idle."""
    if n_queries > tiles["BLOCK_M"]:
        return 1
    return max(1, min(TARGET_PROGRAMS // n_programs, n_keys // (4 * tiles["BLOCK_N"]), 32))


def _tile_choices(q: Tensor, biased: bool = False) -> list[TileChoice]:
    """Candidates for the dtype and head dimension of q; the first that fits the device is the untuned default."""
    head_dim = head_dim_class(q.shape[3])
    specialized: TileRows = {}
    if q.dtype == torch.float64:
        rows = FLOAT64[head_dim]
    elif q.shape[1] <= 16:
        rows = (DECODING_FLOAT32 if q.dtype == torch.float32 else DECODING)[head_dim]
    elif q.dtype == torch.float32:
        rows = FLOAT32[head_dim]
    else:
        rows = (HALF_BIASED if biased else HALF)[head_dim]
        specialized = {} if biased else HALF_SPECIALIZED
    choices = [TileChoice(*row) for row in rows]
    return choices + [TileChoice(*row, warp_specialize=True) for row in specialized.get(head_dim, ())]
