"""Gradient of attention's additive bias: dS summed over the batch rows and heads that share the bias.

A program keeps a tile of the bias's gradient and walks over all batch rows and heads that the bias was broadcast to,
recomputing the scores each time (see ``backward_q``). The sum is made in one program in a fixed order, so two runs are
equal bit for bit, at the cost of two of the backward pass's seven products. Nothing but the gradient itself is written.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.tuning as tuning
from kernels.launch import dot, launch
from kernels.requirements import limits_of
from kernels.triton_ops.attention.problem import AttentionProblem, TileChoice, TileRows, head_dim_class
from kernels.triton_ops.attention.tiles import LOG2_E, head_columns, load_tile, visible_range

# Candidates (TileChoice) by head dimension; what the bias takes is counted.
HALF: TileRows = {
    64: [(64, 64, 0, 4, 2, 40, 72, None), (64, 64, 0, 8, 2, None, None, 72)],
    128: [(64, 64, 0, 8, 2, None, 136, 136), (32, 64, 0, 8, 2, 52, None, None)],
    256: [(32, 64, 0, 8, 1, 64, 64, 64)],
}
FLOAT32: TileRows = {
    64: [(16, 32, 0, 4, 2, 28, 28, 28)],
    128: [(16, 32, 0, 4, 2, 51, 51, 51)],
    256: [(16, 16, 0, 4, 2, 66, 66, 66)],
}
FLOAT64: TileRows = {
    64: [(16, 16, 0, 4, 1, 48, 48, 48)],
    128: [(16, 16, 0, 4, 1, 48, 48, 48)],
    256: [(16, 16, 0, 4, 1, 96, 96, 96)],
}


@triton.jit
def _attention_backward_bias_kernel(
    q_ptr,  # (B, Tq, H, Dh), rotated
    k_ptr,  # (B, Tk, Hkv, Dh), rotated
    v_ptr,  # (B, Tk, Hkv, Dh)
    bias_ptr,  # (B or 1, H or 1, Tq, Tk)
    q_bounds_ptr,  # (B, 4, Tq) int32 or None
    k_bounds_ptr,  # (B, 4, Tk) int32 or None
    lse_ptr,  # (B, H, Tq)
    grad_out_ptr,  # (B, Tq, H, Dh)
    delta_ptr,  # (B, H, Tq)
    grad_bias_ptr,  # (B or 1, H or 1, Tq, Tk), written
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
    n_queries,
    n_keys,
    n_heads,
    n_bias_heads,
    shared_batches,  # B where one bias serves all batch rows, else 1
    shared_heads,  # H where one bias serves all heads, else 1
    window_left,
    window_right,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_key_blocks = (n_keys + BLOCK_N - 1) // BLOCK_N
    q_position = tl.program_id(0) // n_key_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k_position = tl.program_id(0) % n_key_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    q_row, k_row = tl.minimum(q_position, n_queries - 1), tl.minimum(k_position, n_keys - 1)
    q_row64, k_row64 = q_row.to(tl.int64)[:, None], k_row.to(tl.int64)[:, None]
    start, stop, _ = visible_range(q_row, n_keys - n_queries, window_left, window_right, 0, n_keys, None, n_queries)
    in_band = (k_position[None, :] >= start[:, None]) & (k_position[None, :] < stop[:, None])
    columns, column_mask = head_columns(HEAD_DIM, BLOCK_D, False)
    acc_dtype: tl.constexpr = lse_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_dtype)
    any_visible = tl.max(in_band.to(tl.int32)) > 0
    for step in tl.range(0, tl.where(any_visible, shared_batches * shared_heads, 0)):
        batch = (tl.program_id(1) // n_bias_heads + step // shared_heads).to(tl.int64)
        head = (tl.program_id(1) % n_bias_heads + step % shared_heads).to(tl.int64)
        q_base_ptr = q_ptr + batch * q_batch_stride + head * q_head_stride
        grad_out_base_ptr = grad_out_ptr + batch * grad_out_batch_stride + head * grad_out_head_stride
        k_base_ptr = k_ptr + batch * k_batch_stride + head // GROUPS * k_head_stride
        v_base_ptr = v_ptr + batch * v_batch_stride + head // GROUPS * v_head_stride
        q_tile = load_tile(q_base_ptr, q_row64 * q_row_stride + columns[None, :], column_mask, HEAD_DIM, BLOCK_D)
        grad_out_tile = load_tile(
            grad_out_base_ptr, q_row64 * grad_out_row_stride + columns[None, :], column_mask, HEAD_DIM, BLOCK_D
        )
        k_tile = load_tile(k_base_ptr, k_row64 * k_row_stride + columns[None, :], column_mask, HEAD_DIM, BLOCK_D)
        v_tile = load_tile(v_base_ptr, k_row64 * v_row_stride + columns[None, :], column_mask, HEAD_DIM, BLOCK_D)
        lse_index = (batch * n_heads + head) * n_queries + q_row
        scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), acc_dtype), PRECISION)
        bias_base_ptr = bias_ptr + batch * bias_batch_stride + head * bias_head_stride
        bias_offsets = q_row64 * bias_row_stride + k_row64.trans(1, 0) * bias_column_stride
        bias = tl.load(bias_base_ptr + bias_offsets).to(acc_dtype)
        probs = tl.exp2((scores * SCALE + bias) * LOG2_E - tl.load(lse_ptr + lse_index)[:, None])
        grad_probs = dot(grad_out_tile, tl.trans(v_tile), tl.zeros((BLOCK_M, BLOCK_N), acc_dtype), PRECISION)
        visible = in_band
        if q_bounds_ptr is not None:
            q_ids = tl.load(q_bounds_ptr + batch * 4 * n_queries + q_row)
            k_ids = tl.load(k_bounds_ptr + batch * 4 * n_keys + k_row)
            visible &= q_ids[:, None] == k_ids[None, :]
        acc += tl.where(visible, probs * (grad_probs - tl.load(delta_ptr + lse_index)[:, None]), 0.0)
    out_offset = (tl.program_id(1).to(tl.int64) * n_queries + q_position)[:, None] * n_keys + k_position[None, :]
    mask = (q_position < n_queries)[:, None] & (k_position < n_keys)[None, :]
    tl.store(grad_bias_ptr + out_offset, acc.to(grad_bias_ptr.dtype.element_ty), mask=mask)


def run_backward_bias(
    problem: AttentionProblem, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_bias: Tensor
) -> None:
    """Writes the gradient of the bias (B or 1, H or 1, Tq, Tk). Queries and keys come rotated already."""
    run = functools.partial(_run, problem, lse, grad_out, delta, grad_bias)
    limits = limits_of(problem.q.device)
    candidates = [c.tiles() for c in _tile_choices(problem.q) if c.fits(limits, 0)]
    run(tuning.best_tiles("attention_backward_bias", problem.shape_class(), candidates, run))


def _run(
    problem: AttentionProblem, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_bias: Tensor, tiles: tuning.Tiles
) -> None:
    batch_size, n_queries, n_heads, _ = problem.q.shape
    n_bias_batches, n_bias_heads, _, n_keys = grad_bias.shape
    shared = batch_size if n_bias_batches == 1 else 1, n_heads if n_bias_heads == 1 else 1
    windows = problem.window_left, problem.window_right
    sizes = n_queries, n_keys, n_heads, n_bias_heads, *shared, *windows
    strides = problem.strides(grad_out)[:-1]
    arguments = *problem[:6], lse, grad_out, delta, grad_bias, *strides, *sizes
    n_tiles = triton.cdiv(n_queries, tiles["BLOCK_M"]) * triton.cdiv(n_keys, tiles["BLOCK_N"])
    grid = n_tiles, n_bias_batches * n_bias_heads
    tiles = {name: value for name, value in tiles.items() if name != "USE_TMA"}  # it reads by pointers only
    launch(_attention_backward_bias_kernel, grid, *arguments, **problem.constexprs(), **tiles)


def _tile_choices(q: Tensor, biased: bool = True) -> list[TileChoice]:
    """Candidates for the dtype and head dimension of q; the first that fits the device is the untuned default.

    ``biased`` makes no difference here, where there always is a bias.
    """
    by_head_dim = {torch.float64: FLOAT64, torch.float32: FLOAT32}.get(q.dtype, HALF)
    return [TileChoice(*row) for row in by_head_dim[head_dim_class(q.shape[3])]]
