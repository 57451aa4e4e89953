"""LayerNorm (Ba et al. 2016), alone or after dropout and residual add, in one pass over memory.

    total = residual + dropout(x)
    rstd = 1 / sqrt(variance(total) + eps)
    y = (total - mean(total)) * rstd * weight + bias

Shapes, programs and the sum of the parameters' gradients are those of ``rms_norm``. The backward pass reads mean and
rstd, (R,) each, in float32, or float64 for float64 inputs. The variance is computed from the centred row, which is in
registers: no cancellation.
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
def _layer_norm_forward_kernel(
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D), or None: then total is x
    weight_ptr,  # (D,)
    bias_ptr,  # (D,), or None
    total_ptr,  # (R, D)
    y_ptr,  # (R, D)
    mean_ptr,  # (R,), float32, or float64 for float64 inputs
    rstd_ptr,  # (R,)
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
    mean = tl.sum(x, 1, keep_dims=True) / width
    x = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / width + EPS)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(acc_dtype)
    y = x * rstd * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(acc_dtype)
    tl.store(mean_ptr + row, mean, mask=row < n_rows)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _layer_norm_backward_kernel(
    grad_ptr,  # (R, D), gradient by y
    grad_total_ptr,  # (R, D), gradient by total, or None
    total_ptr,  # (R, D)
    weight_ptr,  # (D,)
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    grad_residual_ptr,  # (R, D)
    grad_x_ptr,  # (R, D), or None where it equals grad_residual
    weight_partial_ptr,  # (programs, D), written: each program's part of the gradient of weight
    bias_partial_ptr,  # (programs, D), written, or None without a bias
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
    grad_bias = tl.zeros([BLOCK_R, BLOCK_D], acc_dtype)
    for start in tl.range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < n_rows) & (column < width)
        offset = row.to(tl.int64) * width + column
        grad_tile_ptr = grad_ptr + row.to(tl.int64) * grad_row_stride + column
        total_tile_ptr = total_ptr + row.to(tl.int64) * total_row_stride + column
        grad = tl.load(grad_tile_ptr, mask=inside, other=0.0).to(acc_dtype)
        total = tl.load(total_tile_ptr, mask=inside, other=0.0).to(acc_dtype)
        row_1d = start + tl.arange(0, BLOCK_R)  # one-dimensional: as [BLOCK_R, 1] each thread would load it eight times
        rstd = tl.load(rstd_ptr + row_1d, mask=row_1d < n_rows, other=0.0)[:, None]
        mean = tl.load(mean_ptr + row_1d, mask=row_1d < n_rows, other=0.0)[:, None]
        normed = tl.where(inside, total - mean, 0.0) * rstd
        grad_weight += grad * normed
        if bias_partial_ptr is not None:
            grad_bias += grad
        # Loaded again in each step, from the cache: registers are scarce.
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(acc_dtype)
        grad *= weight
        grad_dot_normed = tl.sum(grad * normed, 1, keep_dims=True) / width
        grad_mean = tl.sum(grad, 1, keep_dims=True) / width
        if BLOCK_D > 8192:  # 32 warps have 64 registers per thread: reload from the cache what does not fit in them
            grad = tl.load(grad_tile_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(acc_dtype)
            weight = tl.load(weight_ptr + column, mask=column < width, other=0.0, eviction_policy="evict_last")
            grad *= weight.to(acc_dtype)
            total = tl.load(total_tile_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(acc_dtype)
            normed = (total - mean) * rstd
        grad_input = rstd * (grad - grad_mean - normed * grad_dot_normed)
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
    tl.store(weight_partial_ptr + offset, tl.sum(grad_weight, 0, keep_dims=True), mask=column < width)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + offset, tl.sum(grad_bias, 0, keep_dims=True), mask=column < width)


def _outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised y, total, mean and rstd. Without a residual, total would equal x and is (0,)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    mean = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(y))
    return y, total, mean, torch.empty_like(mean)


@torch.library.custom_op("trireme::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, total, mean, rstd) of x (..., D), with dropout of x if p > 0; total is (0,) without a residual."""
    y, total, mean, rstd = _outputs(x, residual, weight, bias, eps, p, seed)
    x_rows, n_rows, width = as_rows(x), rstd.numel(), x.shape[-1]
    residual_rows = None if residual is None else as_rows(residual)
    bias_values = None if bias is None else bias.contiguous()
    row_strides = x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0)

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(n_rows, tiles["BLOCK_R"]),)
        pointers = x_rows, residual_rows, weight.contiguous(), bias_values, total, y, mean, rstd
        options = {"EPS": eps, **dropout_constexprs(p), **tiles}
        launch(_layer_norm_forward_kernel, grid, *pointers, n_rows, width, *row_strides, seed, **options)

    if x.numel():
        candidates = forward_tiles(width)
        shape_class = candidates[0]["BLOCK_D"], y.dtype, residual is not None, p > 0
        run(best_tiles("layer_norm_forward", shape_class, candidates, run))
    return y, total, mean, rstd


layer_norm_forward.register_fake(_outputs)


def _gradients(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of residual, x, weight and bias; that of x is (0,) where it equals the residual's."""
    grad_residual = total.new_empty(total.shape, dtype=residual_dtype)
    grad_x = total.new_empty(total.shape if p > 0 or x_dtype != residual_dtype else 0, dtype=x_dtype)
    return (
        grad_residual,
        grad_x,
        torch.empty_like(weight),
        weight.new_empty(0) if bias is None else torch.empty_like(bias),
    )


@torch.library.custom_op("trireme::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, x, weight and bias; that of x is (0,) where it equals that of the residual."""
    grad_residual, grad_x, _, no_bias = _gradients(
        grad, grad_total, total, weight, bias, mean, rstd, x_dtype, residual_dtype, p, seed
    )
    n_rows, width = rstd.numel(), total.shape[-1]
    inputs = as_rows(grad), None if grad_total is None else as_rows(grad_total), as_rows(total)
    row_strides = [0 if t is None else t.stride(0) for t in inputs]

    def run(tiles: Tiles) -> tuple[Tensor, Tensor | None]:
        n_programs = persistent_programs(n_rows, tiles, total.device)
        partials = rstd.new_empty(n_programs, width), None if bias is None else rstd.new_empty(n_programs, width)
        outputs = grad_residual, grad_x if grad_x.numel() else None, *partials
        pointers = *inputs, weight.contiguous(), mean, rstd, *outputs
        options = {**dropout_constexprs(p), **tiles}
        launch(_layer_norm_backward_kernel, (n_programs,), *pointers, n_rows, width, *row_strides, seed, **options)
        return partials

    if total.numel() == 0:
        return grad_residual, grad_x, torch.zeros_like(weight), no_bias if bias is None else torch.zeros_like(bias)
    candidates = backward_tiles(total)
    shape_class = candidates[0]["BLOCK_D"], total.dtype, grad_total is not None, p > 0, bias is not None
    weights, biases = run(best_tiles("layer_norm_backward", shape_class, candidates, run))
    grad_bias = no_bias if bias is None or biases is None else column_sums(biases, bias.dtype)
    return grad_residual, grad_x, column_sums(weights, weight.dtype), grad_bias


layer_norm_backward.register_fake(_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.p, ctx.seed = inputs
    _, total, mean, rstd = output
    ctx.dtypes = x.dtype, (x if residual is None else residual).dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    grad_total = grad_total if ctx.has_residual else None
    saved = total, weight, bias, mean, rstd
    grad_residual, grad_x, grad_weight, grad_bias = layer_norm_backward(
        grad, grad_total, *saved, *ctx.dtypes, ctx.p, ctx.seed
    )
    grad_x = grad_x if grad_x.numel() else grad_residual
    return (
        grad_x,
        grad_residual if ctx.has_residual else None,
        grad_weight,
        grad_bias if bias is not None else None,
        None,
        None,
        None,
    )


layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x (..., D); weight and bias (D,)."""
    if x.shape[-1] > MAX_WIDTH:
        return torch_ops.layer_norm(x, weight, bias, eps)
    return layer_norm_forward(x, None, weight, bias, eps, 0.0, 0)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) where total = residual + dropout(x)."""
    if x.shape[-1] > MAX_WIDTH:
        return torch_ops.add_layer_norm(x, residual, weight, bias, eps, dropout)
    y, total, *_ = layer_norm_forward(x, residual, weight, bias, eps, *(dropout or (0.0, 0)))
    return y, total
