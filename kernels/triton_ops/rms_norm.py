"""RMSNorm (Zhang and Sennrich 2019), alone or after dropout and residual add, in one pass.

    total = residual + dropout(x)
    rstd = 1 / sqrt(mean(total^2) + eps)
    y = total * rstd * weight

x, residual, total and y are R rows of D columns; weight is (D,); rstd (R,) is float32, or float64 for float64 inputs. A
program holds BLOCK_R whole rows in registers, so memory is read once: narrow rows share a program, and a row of 16384
takes 16 warps, so that each thread has four 16-byte loads in flight. The backward pass runs as many programs as the GPU
holds at once; each walks over many rows, prefetches the next block while it computes one, and accumulates its part of
the gradient of weight in registers. A second kernel adds these parts in a fixed order: no atomics, so two runs are
equal bit for bit.
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
from kernels.triton_ops.rows import (
    MAX_WIDTH,
    accumulation_dtype,
    as_rows,
    backward_tiles,
    column_sums,
    dropout_mask,
    forward_tiles,
    persistent_programs,
)
from kernels.tuning import Tiles, best_tiles


@triton.jit(do_not_specialize=["seed"])
def _rms_norm_forward_kernel(
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D), or None: then total is x
    weight_ptr,  # (D,)
    total_ptr,  # (R, D)
    y_ptr,  # (R, D)
    rstd_ptr,  # (R,), float32, or float64 for float64 inputs
    n_rows,
    width,
    x_row_stride,
    residual_row_stride,
    seed,
    EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,  # of dropout; 0 without dropout
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = rstd_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < width)
    offset = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + row.to(tl.int64) * x_row_stride + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row.to(tl.int64) * residual_row_stride + column, mask=inside, other=0.0)
        x = x.to(acc_dtype)
        if THRESHOLD > 0:
            x = tl.where(dropout_mask(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D), x * SCALE, 0.0)
        # Rounded to the stored dtype before normalising, because the backward pass reads the stored total.
        x = (x + residual.to(acc_dtype)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, x, mask=inside)
    x = x.to(acc_dtype)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / width + EPS)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(acc_dtype)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    tl.store(y_ptr + offset, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _rms_norm_backward_kernel(
    grad_ptr,  # (R, D), gradient by y
    grad_total_ptr,  # (R, D), gradient by total, or None
    total_ptr,  # (R, D)
    weight_ptr,  # (D,)
    rstd_ptr,  # (R,)
    grad_residual_ptr,  # (R, D)
    grad_x_ptr,  # (R, D), or None where it equals grad_residual
    partial_ptr,  # (programs, D), written: each program's part of the gradient of weight
    n_rows,
    width,
    grad_row_stride,
    grad_total_row_stride,
    total_row_stride,
    seed,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc_dtype: tl.constexpr = rstd_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_D)[None, :]
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], acc_dtype)
    for start in tl.range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < n_rows) & (column < width)
        offset = row.to(tl.int64) * width + column
        grad = tl.load(grad_ptr + row.to(tl.int64) * grad_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
        total = tl.load(total_ptr + row.to(tl.int64) * total_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
        row_1d = start + tl.arange(0, BLOCK_R)  # one-dimensional: as [BLOCK_R, 1] each thread would load it eight times
        rstd = tl.load(rstd_ptr + row_1d, mask=row_1d < n_rows, other=0.0)[:, None]
        normed = total * rstd
        grad_weight += grad * normed
        # Loaded again in each step, from the cache: registers are scarce.
        grad *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(acc_dtype)
        grad_input = rstd * (grad - normed * (tl.sum(grad * normed, 1, keep_dims=True) / width))
        if grad_total_ptr is not None:
            grad_total_tile_ptr = grad_total_ptr + row.to(tl.int64) * grad_total_row_stride + column
            grad_total = tl.load(grad_total_tile_ptr, mask=inside, other=0.0)
            grad_input += grad_total.to(acc_dtype)
        tl.store(grad_residual_ptr + offset, grad_input.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        if grad_x_ptr is not None:
            if THRESHOLD > 0:
                grad_input = tl.where(
                    dropout_mask(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D), grad_input * SCALE, 0.0
                )
            tl.store(grad_x_ptr + offset, grad_input.to(grad_x_ptr.dtype.element_ty), mask=inside)
    offset = tl.program_id(0) * width + column
    tl.store(partial_ptr + offset, tl.sum(grad_weight, 0, keep_dims=True), mask=column < width)


def _outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, total and rstd. Without a residual, total would equal x and is (0,)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    return y, total, x.new_empty(x.shape[:-1], dtype=accumulation_dtype(y))


@torch.library.custom_op("trireme::rms_norm_forward", mutates_args=())
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, total, rstd) of x (..., D), with dropout of x if p > 0; total is (0,) without a residual."""
    y, total, rstd = _outputs(x, residual, weight, eps, p, seed)
    x_rows, n_rows, width = as_rows(x), rstd.numel(), x.shape[-1]
    residual_rows = None if residual is None else as_rows(residual)
    row_strides = x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0)

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(n_rows, tiles["BLOCK_R"]),)
        pointers = x_rows, residual_rows, weight.contiguous(), total, y, rstd
        options = {"EPS": eps, **dropout_constexprs(p), **tiles}
        launch(_rms_norm_forward_kernel, grid, *pointers, n_rows, width, *row_strides, seed, **options)

    if x.numel():
        candidates = forward_tiles(width)
        shape_class = candidates[0]["BLOCK_D"], y.dtype, residual is not None, p > 0
        run(best_tiles("rms_norm_forward", shape_class, candidates, run))
    return y, total, rstd


rms_norm_forward.register_fake(_outputs)


def _gradients(
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
    """Uninitialised gradients of residual, x and weight; that of x is (0,) where it equals that of the residual."""
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
    """Gradients of residual, x and weight; that of x is (0,) where it equals that of the residual."""
    grad_residual, grad_x, _ = _gradients(grad, grad_total, total, weight, rstd, x_dtype, residual_dtype, p, seed)
    n_rows, width = rstd.numel(), total.shape[-1]
    inputs = as_rows(grad), None if grad_total is None else as_rows(grad_total), as_rows(total)
    row_strides = [0 if t is None else t.stride(0) for t in inputs]

    def run(tiles: Tiles) -> Tensor:
        n_programs = persistent_programs(n_rows, tiles, total.device)
        partial = rstd.new_empty(n_programs, width)
        pointers = *inputs, weight.contiguous(), rstd, grad_residual, grad_x if grad_x.numel() else None, partial
        options = {**dropout_constexprs(p), **tiles}
        launch(_rms_norm_backward_kernel, (n_programs,), *pointers, n_rows, width, *row_strides, seed, **options)
        return partial

    if total.numel() == 0:
        return grad_residual, grad_x, torch.zeros_like(weight)
    candidates = backward_tiles(total)
    shape_class = candidates[0]["BLOCK_D"], total.dtype, grad_total is not None, p > 0
    partial = run(best_tiles("rms_norm_backward", shape_class, candidates, run))
    return grad_residual, grad_x, column_sums(partial, weight.dtype)


rms_norm_backward.register_fake(_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, ctx.p, ctx.seed = inputs
    _, total, rstd = output
    ctx.dtypes = x.dtype, (x if residual is None else residual).dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    grad_total = grad_total if ctx.has_residual else None
    grad_residual, grad_x, grad_weight = rms_norm_backward(
        grad, grad_total, total, weight, rstd, *ctx.dtypes, ctx.p, ctx.seed
    )
    grad_x = grad_x if grad_x.numel() else grad_residual
    return grad_x, grad_residual if ctx.has_residual else None, grad_weight, None, None, None


rms_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x (..., D); weight (D,)."""
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
