"""Dropout alone, where no residual add follows to be fused with.

The mask is a function of (seed, row, column), see ``kernels.philox``. x is R rows of D columns; a program takes BLOCK_R
whole rows. The gradient is multiplied by the same mask and scale, so the op is its own backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.torch_ops as torch_ops
from kernels.launch import launch
from kernels.philox import Dropout, dropout_constexprs
from kernels.triton_ops.rows import MAX_WIDTH, as_rows, dropout_mask, forward_tiles
from kernels.tuning import Tiles, best_tiles


@triton.jit(do_not_specialize=["seed"])  # else seeds divisible by 16 would be compiled separately
def _dropout_kernel(
    x_ptr,  # (R, D)
    out_ptr,  # (R, D), written
    n_rows,
    width,
    x_row_stride,
    seed,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < width)
    x = tl.load(x_ptr + row * x_row_stride + column, mask=inside, other=0.0)
    acc_dtype: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    kept = tl.where(dropout_mask(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D), x.to(acc_dtype) * SCALE, 0.0)
    tl.store(out_ptr + row * width + column, kept.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("trireme::dropout", mutates_args=())
def dropout_op(x: Tensor, p: float, seed: int) -> Tensor:
    """Zeroes each element of x (..., D) with probability p and divides the others by 1 - p."""
    out, x_rows, width = x.new_empty(x.shape), as_rows(x), x.shape[-1]

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(x_rows.shape[0], tiles["BLOCK_R"]),)
        sizes = x_rows.shape[0], width, x_rows.stride(0)
        launch(_dropout_kernel, grid, x_rows, out, *sizes, seed, **dropout_constexprs(p), **tiles)

    if x.numel():
        candidates = forward_tiles(width)
        run(best_tiles("dropout", (candidates[0]["BLOCK_D"], x.dtype), candidates, run))
    return out


@dropout_op.register_fake
def _(x: Tensor, p: float, seed: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
    _, ctx.p, ctx.seed = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return dropout_op(grad, ctx.p, ctx.seed), None, None


dropout_op.register_autograd(_backward, setup_context=_setup_context)


def dropout(x: Tensor, params: Dropout) -> Tensor:
    """Dropout of x (..., D), see ``kernels.ops.dropout``; on torch for rows wider than a program holds."""
    return dropout_op(x, *params) if x.shape[-1] <= MAX_WIDTH else torch_ops.dropout(x, params)
