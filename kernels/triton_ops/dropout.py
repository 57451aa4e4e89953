"""Dropout alone, where no residual add follows that could hide it. The mask is a function of (seed, row, column): kernels.philox.

x is R rows of D columns; a program does BLOCK_R whole rows. The gradient meets the same mask and the same scale: the op is
its own backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.torch_ops as torch_ops
from kernels.launch import launch
from kernels.philox import Dropout, constants
from kernels.triton_ops.rows import MAX_WIDTH, as_rows, forward_tiles, keep
from kernels.tuning import Tiles, best


@triton.jit(do_not_specialize=["seed"])  # a step in sixteen would compile it anew
def _dropout_kernel(
    x_ptr,  # (R, D)
    out_ptr,  # (R, D)
    n_rows,
    width,
    x_step,  # elements from row to row
    seed,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < width)
    x = tl.load(x_ptr + row * x_step + column, mask=inside, other=0.0)
    wide: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    kept = tl.where(keep(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D), x.to(wide) * SCALE, 0.0)
    tl.store(out_ptr + row * width + column, kept.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("trireme::dropout", mutates_args=())
def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """X (..., D) with each element zeroed with probability p and the others divided by 1 - p."""
    out, flat, width = x.new_empty(x.shape), as_rows(x), x.shape[-1]

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(flat.shape[0], tiles["BLOCK_R"]),)
        launch(_dropout_kernel, grid, flat, out, flat.shape[0], width, flat.stride(0), seed, **constants(p), **tiles)

    if x.numel():
        candidates = forward_tiles(width)
        run(best("dropout", (candidates[0]["BLOCK_D"], x.dtype), candidates, run))
    return out


@dropped.register_fake
def _(x: Tensor, p: float, seed: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
    _, ctx.p, ctx.seed = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return dropped(grad, ctx.p, ctx.seed), None, None


dropped.register_autograd(_backward, setup_context=_setup_context)


def dropout(x: Tensor, how: Dropout) -> Tensor:
    """``how`` applied to x (..., D)."""
    return dropped(x, *how) if x.shape[-1] <= MAX_WIDTH else torch_ops.dropout(x, how)
