"""RMSNorm (Zhang and Sennrich 2019), also with dropout and the residual add before it, in one pass over memory.

    total = residual + dropout(x)        rstd = 1 / sqrt(mean(total^2) + eps)        y = total * rstd * weight

x, residual, total and y are R rows of D columns; weight is (D,); rstd (R,) is float32. A program holds BLOCK_R whole rows in
registers, so memory is read once: narrow rows share a program, and a row of 16384 takes 16 warps, for each thread to have four
16-byte loads under way. The backward pass runs as many programs as the GPU holds at once; each walks over many rows, loads the
next while one is at work, and keeps its own share of weight's gradient in registers. A second kernel adds the shares in a fixed
order: no atomics, so two runs give the same bits.
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
from kernels.triton_ops.rows import (
    MAX_WIDTH,
    as_rows,
    backward_tiles,
    column_sums,
    forward_tiles,
    keep,
    programs,
    wide_dtype,
)
from kernels.tuning import Tiles, best


@triton.jit(do_not_specialize=["seed"])
def _rms_norm_forward_kernel(
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D), or None: then total is x
    weight_ptr,  # (D,)
    total_ptr,  # (R, D)
    y_ptr,  # (R, D)
    rstd_ptr,  # (R,), in the format of the statistics
    n_rows,
    width,
    x_step,  # elements from row to row
    residual_step,
    seed,
    EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,  # of dropout; 0 for none
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < width)
    here = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + row.to(tl.int64) * x_step + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row.to(tl.int64) * residual_step + column, mask=inside, other=0.0)
        x = x.to(wide)
        if THRESHOLD > 0:
            x = tl.where(keep(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D), x * SCALE, 0.0)
        x = (x + residual.to(wide)).to(
            total_ptr.dtype.element_ty
        )  # normalised as stored: the backward pass sees no other
        tl.store(total_ptr + here, x, mask=inside)
    x = x.to(wide)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / width + EPS)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(wide)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    tl.store(y_ptr + here, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _rms_norm_backward_kernel(
    grad_ptr,  # (R, D), of y
    grad_total_ptr,  # (R, D), or None
    total_ptr,  # (R, D)
    weight_ptr,  # (D,)
    rstd_ptr,  # (R,)
    grad_residual_ptr,  # (R, D)
    grad_x_ptr,  # (R, D), or None where it equals grad_residual
    partial_ptr,  # (programs, D): each program's share of weight's gradient
    n_rows,
    width,
    grad_step,  # elements from row to row
    grad_total_step,
    total_step,
    seed,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_D)[None, :]
    share = tl.zeros([BLOCK_R, BLOCK_D], wide)
    for start in tl.range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < n_rows) & (column < width)
        here = row.to(tl.int64) * width + column
        grad = tl.load(grad_ptr + row.to(tl.int64) * grad_step + column, mask=inside, other=0.0).to(wide)
        total = tl.load(total_ptr + row.to(tl.int64) * total_step + column, mask=inside, other=0.0).to(wide)
        line = start + tl.arange(0, BLOCK_R)  # of one dimension, or each thread would load it eight times
        rstd = tl.load(rstd_ptr + line, mask=line < n_rows, other=0.0)[:, None]
        normed = total * rstd
        share += grad * normed
        grad *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(
            wide
        )  # from the cache: registers are short
        out = rstd * (grad - normed * (tl.sum(grad * normed, 1, keep_dims=True) / width))
        if grad_total_ptr is not None:
            further = tl.load(grad_total_ptr + row.to(tl.int64) * grad_total_step + column, mask=inside, other=0.0)
            out += further.to(wide)
        tl.store(grad_residual_ptr + here, out.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        if grad_x_ptr is not None:
            if THRESHOLD > 0:
                out = tl.where(keep(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D), out * SCALE, 0.0)
            tl.store(grad_x_ptr + here, out.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * width + column, tl.sum(share, 0, keep_dims=True), mask=column < width)


def _outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y, total and rstd. Without a residual total is x itself, and its place is empty."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    return y, total, x.new_empty(x.shape[:-1], dtype=wide_dtype(y))


@torch.library.custom_op("trireme::rms_norm_forward", mutates_args=())
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, total, rstd) of x (..., D); total is empty where there is no residual. Dropout with p and seed, if p is not 0."""
    y, total, rstd = _outputs(x, residual, weight, eps, p, seed)
    flat, n_rows, width = as_rows(x), rstd.numel(), x.shape[-1]
    added = None if residual is None else as_rows(residual)
    steps = flat.stride(0), 0 if added is None else added.stride(0)

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(n_rows, tiles["BLOCK_R"]),)
        pointers, options = (flat, added, weight.contiguous(), total, y, rstd), {"EPS": eps, **constants(p), **tiles}
        launch(_rms_norm_forward_kernel, grid, *pointers, n_rows, width, *steps, seed, **options)

    if x.numel():
        candidates = forward_tiles(width)
        run(best("rms_norm_forward", (candidates[0]["BLOCK_D"], y.dtype, added is not None, p > 0), candidates, run))
    return y, total, rstd


rms_norm_forward.register_fake(_outputs)


def _grads(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of the residual, of x and of weight. Where the first two are equal, x's place is empty."""
    grad_residual = total.new_empty(total.shape, dtype=residual_dtype)
    grad_x = total.new_empty(total.shape if p > 0 or x_dtype != residual_dtype else 0, dtype=x_dtype)
    return grad_residual, grad_x, torch.empty_like(weight)


@torch.library.custom_op("trireme::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (of the residual, of x, of weight) from those of y and total; x's is empty where it equals the residual's."""
    grad_residual, grad_x, _ = _grads(grad, grad_total, total, weight, rstd, x_dtype, residual_dtype, p, seed)
    n_rows, width = rstd.numel(), total.shape[-1]
    inputs = as_rows(grad), None if grad_total is None else as_rows(grad_total), as_rows(total)
    steps = [0 if t is None else t.stride(0) for t in inputs]

    def run(tiles: Tiles) -> Tensor:
        count = programs(n_rows, tiles, total.device)
        partial = rstd.new_empty(count, width)
        pointers = *inputs, weight.contiguous(), rstd, grad_residual, grad_x if grad_x.numel() else None, partial
        launch(_rms_norm_backward_kernel, (count,), *pointers, n_rows, width, *steps, seed, **constants(p), **tiles)
        return partial

    if total.numel() == 0:
        return grad_residual, grad_x, torch.zeros_like(weight)
    candidates = backward_tiles(width)
    classes = candidates[0]["BLOCK_D"], total.dtype, grad_total is not None, p > 0
    partial = run(best("rms_norm_backward", classes, candidates, run))
    return grad_residual, grad_x, column_sums(partial, weight.dtype)


rms_norm_backward.register_fake(_grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, ctx.p, ctx.seed = inputs
    _, total, rstd = output
    ctx.dtypes = x.dtype, (x if residual is None else residual).dtype
    ctx.added = residual is not None
    ctx.save_for_backward(total if ctx.added else x, weight, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    grad_total = grad_total if ctx.added else None
    grad_residual, grad_x, grad_weight = rms_norm_backward(
        grad, grad_total, total, weight, rstd, *ctx.dtypes, ctx.p, ctx.seed
    )
    grad_x = grad_x if grad_x.numel() else grad_residual
    return grad_x, grad_residual if ctx.added else None, grad_weight, None, None, None


rms_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of the last dimension of x; weight (D,)."""
    if x.shape[-1] > MAX_WIDTH:
        return torch_ops.rms_norm(x, weight, eps)
    return rms_norm_forward(x, None, weight, eps, 0.0, 0)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) where total = residual + dropout(x)."""
    if x.shape[-1] > MAX_WIDTH:
        return torch_ops.add_rms_norm(x, residual, weight, eps, dropout)
    y, total, _ = rms_norm_forward(x, residual, weight, eps, *(dropout or (0.0, 0)))
    return y, total
