"""The forward pass of attention: one pass over the keys with the softmax kept in running form.

A program holds BLOCK_M queries of one head in registers and reads the keys and values tile by tile: scores, their running
maximum and sum, and the output, rescaled when the maximum grows (Milakov and Gimelshein 2018; Dao et al. 2022, 2023). No
score leaves the program; for the backward pass it keeps the logarithm of each row's sum, in base 2.

Parallel over query blocks, rows, heads, and, where those are few (decoding), parts of the keys, which a second kernel
merges in a fixed order (Dao et al. 2023, "Flash-Decoding").

On Hopper: tiles of 128 queries let each of two warp groups own a wgmma of 64 rows, whose left operand (queries) and
accumulators stay in registers; keys and values stream through shared memory by asynchronous copies, num_stages tiles deep.
The loop over tiles that every row sees whole has no comparison in it: on long rows it is nearly all of the work. log2(e) is
folded into the scale, so the exponential is one instruction and the scaling one fused multiply-add.
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
from kernels.triton_ops.attention.problem import Choice, Problem, boxed, padded, rounded, run_best, side_by_side
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
)

PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200: with fewer, the keys are split."""


@triton.jit
def _attention_forward_kernel(
    q,  # (B, Tq, H, Dh)
    k,  # (B, Tk, Hkv, Dh)
    v,  # (B, Tk, Hkv, Dh)
    bias,  # (B or 1, H or 1, Tq, Tk) or None
    q_marks,  # (B, 4, Tq) int32 or None
    k_marks,  # (B, 4, Tk) int32 or None
    cos,  # (B or 1, T, Dh/2) float32 or None
    sin,
    out,  # (S, B, Tq, H, Dh)
    lse,  # (S, B, H, Tq), base 2; inf where a query sees nothing
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
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
    part,  # keys of a split, a multiple of BLOCK_N
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
    # Which queries, and what they see. Rows past the end repeat the last one and are not stored.
    blocks = (queries + BLOCK_M - 1) // BLOCK_M
    block, pair = place(tl.program_id(0), blocks, pairs, beside)
    block = blocks - 1 - block  # causal: the last sees most
    split = tl.program_id(1).to(tl.int64)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    at = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(at, queries - 1)
    if q_marks is not None:
        q_marks += row * 4 * queries
        k_marks += row * 4 * keys
        ids = tl.load(q_marks + rows)
    low = tl.program_id(1) * part
    start, stop, whole_stop = sees(
        rows, keys - queries, before, after, low, tl.minimum(low + part, keys), q_marks, queries
    )
    begin, whole_begin, whole, edges = tiles(start, stop, whole_stop, BLOCK_N)

    plain, plain_kept = columns(HEAD_DIM, BLOCK_D, False)
    cols, kept = columns(HEAD_DIM, BLOCK_D, cos is not None)
    far = rows.to(tl.int64)[:, None]
    if cos is None:
        q_tile = load_tile(q + row * q_b + head * q_h, far * q_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
    else:
        q_tile = load_turned(
            q + row * q_b + head * q_h, far * q_t, cos + row * cos_b, sin + row * cos_b, rows, HEAD_DIM, BLOCK_D
        )
    kv_head = head // GROUPS

    wide: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    unit: tl.constexpr = SCALE * LOG2_E if bias is None else 1.0  # what a raw score is multiplied with, to base 2
    largest = tl.full((BLOCK_M,), float("-inf"), wide)
    total = tl.zeros((BLOCK_M,), wide)
    acc = tl.zeros((BLOCK_M, BLOCK_D), wide)
    for EDGE in tl.static_range(2):
        for number in tl.range(0, edges if EDGE else whole):
            first = tile_at(number, EDGE, begin, whole_begin, whole, BLOCK_N)
            inside = tl.arange(0, BLOCK_N)
            if EDGE:
                inside = tl.minimum(inside, keys - 1 - first)
            k_tile = load_rows(k, row, kv_head, first, inside, k_b, k_t, k_h, cols, kept, HEAD_DIM, BLOCK_D, BOXES)
            scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), wide), PRECISION)
            if bias is not None:
                offsets = far * bias_q + (first + inside).to(tl.int64)[None, :] * bias_k
                added = tl.load(bias + row * bias_b + head * bias_h + offsets).to(wide)
                scores = (scores * SCALE + added) * LOG2_E
            if EDGE:
                places = first + tl.arange(0, BLOCK_N)
                seen = (places[None, :] >= start[:, None]) & (places[None, :] < stop[:, None])
                if q_marks is not None:
                    seen &= ids[:, None] == tl.load(k_marks + first + inside)[None, :]
                scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1) * unit)
            base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen so far
            weights = tl.exp2(scores * unit - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(weights, 1)
            v_tile = load_rows(
                v, row, kv_head, first, inside, v_b, v_t, v_h, plain, plain_kept, HEAD_DIM, BLOCK_D, BOXES
            )
            acc = dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
            largest = new

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    stored = (split * (pairs // heads) + row) * queries + at
    tl.store(
        out + (stored * heads + head)[:, None] * HEAD_DIM + plain[None, :],
        acc.to(out.dtype.element_ty),
        mask=(at < queries)[:, None] & plain_kept[None, :],
    )
    sums = tl.where(empty, float("inf"), largest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + (split * pairs + pair) * queries + at, sums, mask=at < queries)


@triton.jit
def _attention_merge_kernel(
    parts,  # (S, B, Tq, H, Dh)
    part_lse,  # (S, B, H, Tq)
    out,  # (B, Tq, H, Dh)
    lse,  # (B, H, Tq)
    splits,
    queries,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    index, size = tl.program_id(0).to(tl.int64), tl.num_programs(0)  # of B * Tq * H
    row, query, head = index // (queries * heads), index // heads % queries, index % heads
    which = (row * heads + head) * queries + query
    split, cols = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    sums = tl.load(part_lse + split.to(tl.int64) * size + which, mask=split < splits, other=float("inf"))
    sums = tl.where(sums == float("inf"), float("-inf"), sums)
    largest = tl.max(sums, 0)
    empty = largest == float("-inf")
    weights = tl.exp2(sums - tl.where(empty, 0.0, largest))
    total = tl.where(empty, 1.0, tl.sum(weights, 0))
    kept = (split < splits)[:, None] & (cols < HEAD_DIM)[None, :]
    tile = tl.load(
        parts + (split.to(tl.int64) * size + index)[:, None] * HEAD_DIM + cols[None, :], mask=kept, other=0.0
    )
    merged = tl.sum(tile * weights[:, None], 0) / total
    tl.store(out + index * HEAD_DIM + cols, merged.to(out.dtype.element_ty), mask=cols < HEAD_DIM)
    tl.store(lse + which, tl.where(empty, float("inf"), largest + tl.log2(total)))


def run_forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Writes the output (B, Tq, H, Dh) and the log-sums (B, H, Tq). Keys are turned already, queries are not."""
    run = functools.partial(_run, problem, out, lse)
    run_best("attention_forward", problem, problem[1:3], _choices(problem.q), run)


def _run(problem: Problem, out: Tensor, lse: Tensor, chosen: tuning.Tiles) -> None:
    (rows, queries, heads, head_dim), keys = out.shape, problem.k.shape[1]
    programs = triton.cdiv(queries, chosen["BLOCK_M"]) * rows * heads
    splits = _splits(programs, queries, keys, chosen)
    part = triton.cdiv(triton.cdiv(keys, splits), chosen["BLOCK_N"]) * chosen["BLOCK_N"]
    parts, part_lse = out, lse
    if splits > 1:
        parts, part_lse = (lse.new_empty((splits, *x.shape)) for x in (out, lse))
    heads_beside = side_by_side(problem.k) * problem.groups
    sizes = queries, keys, heads, rows * heads, problem.before, problem.after, part, heads_beside
    k: Any = problem.k
    v: Any = problem.v
    if chosen["BOXES"]:
        k, v = (boxed(x, chosen["BLOCK_N"]) for x in (k, v))
    arguments = problem.q, k, v, *problem[3:8], parts, part_lse, *problem.strides(), *sizes
    launch(_attention_forward_kernel, (programs, splits), *arguments, **problem.constants(), **chosen)
    if splits > 1:
        dims = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_S": triton.next_power_of_2(splits)}
        grid = (rows * queries * heads,)
        launch(_attention_merge_kernel, grid, parts, part_lse, out, lse, splits, queries, heads, **dims, num_warps=4)


def _splits(programs: int, queries: int, keys: int, chosen: tuning.Tiles) -> int:
    """Parts that the keys are cut into: more than one where a single block of queries leaves multiprocessors idle."""
    if queries > chosen["BLOCK_M"]:
        return 1
    return max(1, min(PROGRAMS // programs, keys // (4 * chosen["BLOCK_N"]), 32))


def _choices(q: Tensor) -> list[Choice]:
    if q.dtype == torch.float64:
        return [(32, 32, 0, 8, 1)] if q.shape[3] <= 128 else [(16, 16, 0, 8, 1)]
    if q.shape[1] <= 16:
        return (
            [(16, 64, 0, 4, 3), (16, 128, 0, 4, 3)]
            if q.shape[3] <= 128 and q.element_size() == 2
            else [(16, 32, 0, 4, 2)]
        )
    if q.dtype == torch.float32:
        return {64: [(128, 64, 0, 8, 2)], 128: [(128, 32, 0, 8, 2)], 256: [(16, 32, 0, 8, 1)]}[rounded(q.shape[3])]
    return {
        64: [(128, 64, 0, 8, 3), (128, 128, 1, 8, 2), (128, 64, 1, 8, 3), (64, 64, 1, 4, 3), (128, 64, 1, 4, 3)],
        128: [(128, 128, 0, 8, 2), (128, 128, 1, 8, 2), (128, 64, 1, 8, 3), (64, 64, 1, 4, 3), (64, 128, 1, 4, 2)],
        256: [(128, 32, 0, 8, 2), (128, 64, 1, 8, 2), (64, 32, 1, 4, 2)],
    }[rounded(q.shape[3])]
