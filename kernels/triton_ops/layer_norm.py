"""LayerNorm (Ba et al. 2016), also with dropout and the residual add before it, in one pass over memory.

    total = residual + dropout(x)        rstd = 1 / sqrt(variance(total) + eps)        y = (total - mean) * rstd * weight + bias

Shapes and programs are those of ``layer_norm``. The statistics kept for the backward pass are mean and rstd, (R,) in float32; the
variance is that of the centred row, which is in registers: no cancellation. weight's and bias's gradients are shared out alike.
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
def _layer_norm_forward_kernel(
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D), or None: then total is x
    weight_ptr,  # (D,)
    bias_ptr,  # (D,), or None
    total_ptr,  # (R, D)
    y_ptr,  # (R, D)
    mean_ptr,  # (R,), in the format of the statistics
    rstd_ptr,  # (R,)
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
    mean = tl.sum(x, 1, keep_dims=True) / width
    x = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / width + EPS)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(wide)
    y = x * rstd * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(wide)
    tl.store(mean_ptr + row, mean, mask=row < n_rows)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _layer_norm_backward_kernel(
    grad_ptr,  # (R, D), of y
    grad_total_ptr,  # (R, D), or None
    total_ptr,  # (R, D)
    weight_ptr,  # (D,)
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    grad_residual_ptr,  # (R, D)
    grad_x_ptr,  # (R, D), or None where it equals grad_residual
    weight_partial_ptr,  # (programs, D): each program's share of weight's gradient
    bias_partial_ptr,  # (programs, D), or None where there is no bias
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
    weight_share = tl.zeros([BLOCK_R, BLOCK_D], wide)
    bias_share = tl.zeros([BLOCK_R, BLOCK_D], wide)
    for start in tl.range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < n_rows) & (column < width)
        here = row.to(tl.int64) * width + column
        grad_at = grad_ptr + row.to(tl.int64) * grad_step + column
        total_at = total_ptr + row.to(tl.int64) * total_step + column
        grad = tl.load(grad_at, mask=inside, other=0.0).to(wide)
        total = tl.load(total_at, mask=inside, other=0.0).to(wide)
        line = start + tl.arange(0, BLOCK_R)  # of one dimension, or each thread would load it eight times
        rstd = tl.load(rstd_ptr + line, mask=line < n_rows, other=0.0)[:, None]
        mean = tl.load(mean_ptr + line, mask=line < n_rows, other=0.0)[:, None]
        normed = tl.where(inside, total - mean, 0.0) * rstd
        weight_share += grad * normed
        if bias_partial_ptr is not None:
            bias_share += grad
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(
            wide
        )  # from the cache: registers are short
        grad *= weight
        along = tl.sum(grad * normed, 1, keep_dims=True) / width
        level = tl.sum(grad, 1, keep_dims=True) / width
        if (
            BLOCK_D > 8192
        ):  # 32 warps have 64 registers a thread: read again, from the cache, what would not stay in them
            grad = tl.load(grad_at, mask=inside, other=0.0, eviction_policy="evict_first").to(wide)
            grad *= tl.load(weight_ptr + column, mask=column < width, other=0.0, eviction_policy="evict_last").to(wide)
            normed = (tl.load(total_at, mask=inside, other=0.0, eviction_policy="evict_first").to(wide) - mean) * rstd
        out = rstd * (grad - level - normed * along)
        if grad_total_ptr is not None:
            further = tl.load(grad_total_ptr + row.to(tl.int64) * grad_total_step + column, mask=inside, other=0.0)
            out += further.to(wide)
        tl.store(grad_residual_ptr + here, out.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        if grad_x_ptr is not None:
            if THRESHOLD > 0:
                out = tl.where(keep(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D), out * SCALE, 0.0)
            tl.store(grad_x_ptr + here, out.to(grad_x_ptr.dtype.element_ty), mask=inside)
    here = tl.program_id(0) * width + column
    tl.store(weight_partial_ptr + here, tl.sum(weight_share, 0, keep_dims=True), mask=column < width)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + here, tl.sum(bias_share, 0, keep_dims=True), mask=column < width)


def _outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for y, total, mean and rstd. Without a residual total is x itself, and its place is empty."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    mean = x.new_empty(x.shape[:-1], dtype=wide_dtype(y))
    return y, total, mean, torch.empty_like(mean)


@torch.library.custom_op("trireme::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, total, mean, rstd) of x (..., D); total is empty where there is no residual. Dropout with p and seed, if p is not 0."""
    y, total, mean, rstd = _outputs(x, residual, weight, bias, eps, p, seed)
    flat, n_rows, width = as_rows(x), rstd.numel(), x.shape[-1]
    added = None if residual is None else as_rows(residual)
    shift = None if bias is None else bias.contiguous()
    steps = flat.stride(0), 0 if added is None else added.stride(0)

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(n_rows, tiles["BLOCK_R"]),)
        pointers, options = (
            (flat, added, weight.contiguous(), shift, total, y, mean, rstd),
            {"EPS": eps, **constants(p), **tiles},
        )
        launch(_layer_norm_forward_kernel, grid, *pointers, n_rows, width, *steps, seed, **options)

    if x.numel():
        candidates = forward_tiles(width)
        run(best("layer_norm_forward", (candidates[0]["BLOCK_D"], y.dtype, added is not None, p > 0), candidates, run))
    return y, total, mean, rstd


layer_norm_forward.register_fake(_outputs)


def _grads(
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
    """Room for the gradients of the residual, x, weight and bias. x's place is empty where it equals the residual's."""
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
    """Gradients (of the residual, x, weight, bias) from those of y and total; x's is empty where it equals the residual's."""
    grad_residual, grad_x, _, no_bias = _grads(
        grad, grad_total, total, weight, bias, mean, rstd, x_dtype, residual_dtype, p, seed
    )
    n_rows, width = rstd.numel(), total.shape[-1]
    inputs = as_rows(grad), None if grad_total is None else as_rows(grad_total), as_rows(total)
    steps = [0 if t is None else t.stride(0) for t in inputs]

    def run(tiles: Tiles) -> tuple[Tensor, Tensor | None]:
        count = programs(n_rows, tiles, total.device)
        partials = rstd.new_empty(count, width), None if bias is None else rstd.new_empty(count, width)
        outputs = grad_residual, grad_x if grad_x.numel() else None, *partials
        pointers = *inputs, weight.contiguous(), mean, rstd, *outputs
        launch(_layer_norm_backward_kernel, (count,), *pointers, n_rows, width, *steps, seed, **constants(p), **tiles)
        return partials

    if total.numel() == 0:
        return grad_residual, grad_x, torch.zeros_like(weight), no_bias if bias is None else torch.zeros_like(bias)
    candidates = backward_tiles(width)
    classes = candidates[0]["BLOCK_D"], total.dtype, grad_total is not None, p > 0, bias is not None
    weights, biases = run(best("layer_norm_backward", classes, candidates, run))
    grad_bias = no_bias if bias is None or biases is None else column_sums(biases, bias.dtype)
    return grad_residual, grad_x, column_sums(weights, weight.dtype), grad_bias


layer_norm_backward.register_fake(_grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.p, ctx.seed = inputs
    _, total, mean, rstd = output
    ctx.dtypes = x.dtype, (x if residual is None else residual).dtype
    ctx.added = residual is not None
    ctx.save_for_backward(total if ctx.added else x, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    grad_total = grad_total if ctx.added else None
    saved = total, weight, bias, mean, rstd
    grad_residual, grad_x, grad_weight, grad_bias = layer_norm_backward(
        grad, grad_total, *saved, *ctx.dtypes, ctx.p, ctx.seed
    )
    grad_x = grad_x if grad_x.numel() else grad_residual
    return (
        grad_x,
        grad_residual if ctx.added else None,
        grad_weight,
        grad_bias if bias is not None else None,
        None,
        None,
        None,
    )


layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of the last dimension of x; weight and bias (D,)."""
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
