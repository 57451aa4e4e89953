"""Rotary position embedding (Su et al. 2021), with halves as pairs.

The order of halves is that of Llama checkpoints of transformers. x (B, T, H, Dh) is B * T * H rows of two halves; the
angles belong to a token, (B, T, 1, Dh/2) in float32. A program rotates BLOCK_R rows: heads of a token are adjacent, so
the angles come from the cache for all but the first. q and k may be views into one projection. The gradient is rotated
back by the same angles, so the op is its own backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.torch_ops import RopeTable
from kernels.tuning import Tiles, best_tiles


@triton.jit
def _rope_kernel(
    x_ptr,  # (B, T, H, 2 * half)
    cos_ptr,  # (B, T, 1, half)
    sin_ptr,  # (B, T, 1, half)
    out_ptr,  # (B, T, H, 2 * half), written, contiguous
    n_rows,  # B * T * H
    length,
    n_heads,
    half,
    x_batch_stride,
    x_token_stride,
    x_head_stride,
    cos_batch_stride,
    cos_token_stride,
    BACKWARD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < half)
    batch, token, head = row // n_heads // length, row // n_heads % length, row % n_heads
    x_tile_ptr = x_ptr + batch * x_batch_stride + token * x_token_stride + head * x_head_stride + column
    angle_offset = batch * cos_batch_stride + token * cos_token_stride + column
    a = tl.load(x_tile_ptr, mask=inside, other=0.0).to(acc_dtype)
    b = tl.load(x_tile_ptr + half, mask=inside, other=0.0).to(acc_dtype)
    cos = tl.load(cos_ptr + angle_offset, mask=inside, other=0.0).to(acc_dtype)
    sin = tl.load(sin_ptr + angle_offset, mask=inside, other=0.0).to(acc_dtype)
    if BACKWARD:
        sin = -sin
    out_tile_ptr = out_ptr + row * 2 * half + column
    tl.store(out_tile_ptr, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_tile_ptr + half, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("trireme::rope", mutates_args=())
def rope_op(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Rotates x (B, T, H, Dh) by the angles of cos and sin (B or 1, T, 1, Dh/2), or back by them with ``backward``."""
    out = x.new_empty(x.shape)
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch_size, length, n_heads, head_dim = x.shape
    cos, sin = (t.contiguous().expand(batch_size, -1, -1, -1) for t in (cos, sin))
    n_rows = batch_size * length * n_heads
    block_d = max(triton.next_power_of_2(head_dim // 2), 16)
    sizes = n_rows, length, n_heads, head_dim // 2
    strides = *x.stride()[:3], *cos.stride()[:2]

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(n_rows, tiles["BLOCK_R"]),)
        constexprs = {"BACKWARD": backward, "BLOCK_D": block_d, **tiles}
        launch(_rope_kernel, grid, x, cos, sin, out, *sizes, *strides, **constexprs)

    if x.numel():
        candidates = [{"BLOCK_R": elements // block_d, "num_warps": 4} for elements in (2048, 1024, 4096)]
        run(best_tiles("rope", (block_d, x.dtype), candidates, run))
    return out


@rope_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return rope_op(grad, *ctx.saved_tensors, not ctx.backward), None, None, None


rope_op.register_autograd(_backward, setup_context=_setup_context)


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotary position embedding of x (B, T, H, Dh), computed in float32, or in float64 for float64 inputs."""
    return rope_op(x, table.cos, table.sin, False)
