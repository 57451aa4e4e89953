"""gelu(x + bias) in one pass, tanh form (Hendrycks and Gimpel 2016).

x is R rows of D columns, bias (D,) or None. A program computes a tile [BLOCK_R, BLOCK_D]. In the backward pass the
programs of a block of columns divide its rows among them: each accumulates its part of the gradient of bias in
registers, and a second kernel adds these parts in a fixed order. Only x and bias are saved for the backward pass, which
recomputes the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.triton_ops.activations import gelu
from kernels.triton_ops.rows import accumulation_dtype, as_rows, column_sums, elementwise_tiles, multiprocessor_count
from kernels.tuning import Tiles, best_tiles

PROGRAMS_PER_MULTIPROCESSOR = 8
"""Programs of 4 warps that a multiprocessor holds at once, in the backward pass."""


@triton.jit
def _bias_gelu_forward_kernel(
    x_ptr,  # (R, D)
    bias_ptr,  # (D,), or None
    out_ptr,  # (R, D), written
    n_rows,
    width,
    x_row_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < width)
    x = tl.load(x_ptr + row * x_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(acc_dtype)
    y, _ = gelu(x)
    tl.store(out_ptr + row * width + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward_kernel(
    grad_ptr,  # (R, D)
    x_ptr,  # (R, D)
    bias_ptr,  # (D,), or None
    grad_x_ptr,  # (R, D), written
    partial_ptr,  # (programs along the rows, D), written, or None without a bias
    n_rows,
    width,
    grad_row_stride,
    x_row_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    grad_bias = tl.zeros([BLOCK_R, BLOCK_D], acc_dtype)
    for start in range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
        inside = (row < n_rows) & (column < width)
        x = tl.load(x_ptr + row * x_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(acc_dtype)
        _, derivative = gelu(x)
        grad = tl.load(grad_ptr + row * grad_row_stride + column, mask=inside, other=0.0).to(acc_dtype) * derivative
        grad_bias += grad
        tl.store(grad_x_ptr + row * width + column, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        offset = tl.program_id(0) * width + column
        tl.store(partial_ptr + offset, tl.sum(grad_bias, 0, keep_dims=True), mask=column < width)


@torch.library.custom_op("trireme::bias_gelu_forward", mutates_args=())
def bias_gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x + bias) of x (..., D) and bias (D,), in the dtype of x."""
    out, x_rows, width = x.new_empty(x.shape), as_rows(x), x.shape[-1]
    bias_values = None if bias is None else bias.contiguous()

    def run(tiles: Tiles) -> None:
        n_rows = x_rows.shape[0]
        grid = triton.cdiv(n_rows, tiles["BLOCK_R"]), triton.cdiv(width, tiles["BLOCK_D"])
        launch(_bias_gelu_forward_kernel, grid, x_rows, bias_values, out, n_rows, width, x_rows.stride(0), **tiles)

    if x.numel():
        candidates = [elementwise_tiles(width, 4096), elementwise_tiles(width, 2048)]
        run(best_tiles("bias_gelu_forward", (candidates[0]["BLOCK_D"], x.dtype, bias is not None), candidates, run))
    return out


@bias_gelu_forward.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("trireme::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and bias (D,); the latter is (0,) without a bias."""
    grad_x, no_bias = x.new_empty(x.shape), x.new_empty(0)
    if x.numel() == 0:
        return grad_x, no_bias if bias is None else torch.zeros_like(bias)
    inputs, width, bias_values = (
        [as_rows(t) for t in (grad, x)],
        x.shape[-1],
        None if bias is None else bias.contiguous(),
    )

    def run(tiles: Tiles) -> Tensor | None:
        n_rows, n_column_blocks = inputs[0].shape[0], triton.cdiv(width, tiles["BLOCK_D"])
        max_programs = max(multiprocessor_count(x.device) * PROGRAMS_PER_MULTIPROCESSOR // n_column_blocks, 1)
        n_programs = min(max_programs, triton.cdiv(n_rows, tiles["BLOCK_R"]))
        partial = None if bias is None else x.new_empty(n_programs, width, dtype=accumulation_dtype(x))
        row_strides = [t.stride(0) for t in inputs]
        launch(
            _bias_gelu_backward_kernel,
            (n_programs, n_column_blocks),
            *inputs,
            bias_values,
            grad_x,
            partial,
            n_rows,
            width,
            *row_strides,
            **tiles,
        )
        return partial

    candidates = [elementwise_tiles(width, 2048), elementwise_tiles(width, 4096)]
    partial = run(
        best_tiles("bias_gelu_backward", (candidates[0]["BLOCK_D"], x.dtype, bias is not None), candidates, run)
    )
    return grad_x, no_bias if bias is None or partial is None else column_sums(partial, bias.dtype)


@bias_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = bias_gelu_backward(grad, x, bias)
    return grad_x, None if bias is None else grad_bias


bias_gelu_forward.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x (..., D) + bias (D,), in the tanh form that GPT-2 was trained with."""
    return bias_gelu_forward(x, bias)
