"""The product inside SwiGLU and GeGLU (Shazeer 2020): activation(gate) * up, in one pass.

gate and up are R rows of D columns, often the two halves of one tensor: their row strides are read, so neither is
copied. A program computes a tile [BLOCK_R, BLOCK_D]. Only gate and up are saved for the backward pass, which recomputes
the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.triton_ops.activations import gelu, silu
from kernels.triton_ops.rows import as_rows, elementwise_tiles
from kernels.tuning import Tiles, best_tiles


@triton.jit
def _gated_mlp_forward_kernel(
    gate_ptr,  # (R, D)
    up_ptr,  # (R, D)
    out_ptr,  # (R, D), written
    n_rows,
    width,
    gate_row_stride,
    up_row_stride,
    GELU: tl.constexpr,  # else SiLU
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < width)
    gate = tl.load(gate_ptr + row * gate_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
    up = tl.load(up_ptr + row * up_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
    active, _ = gelu(gate) if GELU else silu(gate)
    tl.store(out_ptr + row * width + column, (active * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_mlp_backward_kernel(
    grad_ptr,  # (R, D)
    gate_ptr,  # (R, D)
    up_ptr,  # (R, D)
    grad_gate_ptr,  # (R, D), written
    grad_up_ptr,  # (R, D), written
    n_rows,
    width,
    grad_row_stride,
    gate_row_stride,
    up_row_stride,
    GELU: tl.constexpr,  # else SiLU
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < width)
    grad = tl.load(grad_ptr + row * grad_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
    gate = tl.load(gate_ptr + row * gate_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
    up = tl.load(up_ptr + row * up_row_stride + column, mask=inside, other=0.0).to(acc_dtype)
    active, derivative = gelu(gate) if GELU else silu(gate)
    offset = row * width + column
    tl.store(grad_gate_ptr + offset, (grad * up * derivative).to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + offset, (grad * active).to(grad_up_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("trireme::gated_mlp_forward", mutates_args=())
def gated_mlp_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of gate and up (..., D), in the dtype of gate."""
    out = gate.new_empty(gate.shape)
    inputs, width = [as_rows(t) for t in (gate, up)], gate.shape[-1]
    row_strides = [t.stride(0) for t in inputs]

    def run(tiles: Tiles) -> None:
        n_rows = inputs[0].shape[0]
        grid = triton.cdiv(n_rows, tiles["BLOCK_R"]), triton.cdiv(width, tiles["BLOCK_D"])
        arguments = *inputs, out, n_rows, width, *row_strides
        launch(_gated_mlp_forward_kernel, grid, *arguments, GELU=activation == "gelu", **tiles)

    if gate.numel():
        candidates = [elementwise_tiles(width, 4096), elementwise_tiles(width, 2048)]
        run(best_tiles("gated_mlp_forward", (candidates[0]["BLOCK_D"], gate.dtype, activation), candidates, run))
    return out


@gated_mlp_forward.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("trireme::gated_mlp_backward", mutates_args=())
def gated_mlp_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (..., D) each."""
    grads = gate.new_empty(gate.shape), up.new_empty(up.shape)
    inputs, width = [as_rows(t) for t in (grad, gate, up)], gate.shape[-1]
    row_strides = [t.stride(0) for t in inputs]

    def run(tiles: Tiles) -> None:
        n_rows = inputs[0].shape[0]
        grid = triton.cdiv(n_rows, tiles["BLOCK_R"]), triton.cdiv(width, tiles["BLOCK_D"])
        arguments = *inputs, *grads, n_rows, width, *row_strides
        launch(_gated_mlp_backward_kernel, grid, *arguments, GELU=activation == "gelu", **tiles)

    if gate.numel():
        candidates = [elementwise_tiles(width, 2048), elementwise_tiles(width, 4096)]
        run(best_tiles("gated_mlp_backward", (candidates[0]["BLOCK_D"], gate.dtype, activation), candidates, run))
    return grads


@gated_mlp_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *gated_mlp_backward(grad, *ctx.saved_tensors, ctx.activation), None


gated_mlp_forward.register_autograd(_backward, setup_context=_setup_context)


def gated_mlp(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up (..., D): the product inside SwiGLU with "silu", inside GeGLU with "gelu"."""
    return gated_mlp_forward(gate, up, activation)
