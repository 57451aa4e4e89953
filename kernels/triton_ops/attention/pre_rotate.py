"""Rotary embedding of the keys into a copy, before the kernels whose loops read them many times over.

The queries are rotated as they are loaded, and gradients are rotated back before they are stored (``attention.tiles``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.triton_ops.attention.problem import padded_head_dim
from kernels.triton_ops.attention.tiles import load_halves, rotate


@triton.jit
def _attention_pre_rotate_kernel(
    x_ptr,  # (B, T, H, Dh)
    cos_ptr,  # (B or 1, T, Dh/2)
    sin_ptr,  # (B or 1, T, Dh/2)
    out_ptr,  # (B, T, H, Dh), contiguous
    x_batch_stride,
    x_row_stride,
    x_head_stride,
    cos_batch_stride,
    length,
    n_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    batch, head = tl.program_id(1).to(tl.int64) // n_heads, tl.program_id(1) % n_heads
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(position, length - 1)
    x_base_ptr = x_ptr + batch * x_batch_stride + head * x_head_stride
    a, b = load_halves(x_base_ptr, row.to(tl.int64)[:, None] * x_row_stride, HEAD_DIM, BLOCK_D)
    a, b = rotate(a, b, cos_ptr + batch * cos_batch_stride, sin_ptr + batch * cos_batch_stride, row, 1.0, HEAD_DIM)
    half = tl.arange(0, BLOCK_D // 2)
    out_tile_ptr = out_ptr + ((batch * length + position) * n_heads + head)[:, None] * HEAD_DIM + half[None, :]
    mask = (position < length)[:, None] & (half < HEAD_DIM // 2)[None, :]
    tl.store(out_tile_ptr, a.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_tile_ptr + HEAD_DIM // 2, b.to(out_ptr.dtype.element_ty), mask=mask)


def pre_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A contiguous copy of x (B, T, H, Dh) in rotary embedding, by contiguous cos and sin (B or 1, T, 1, Dh/2)."""
    batch_size, length, n_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_m = 64
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "BLOCK_M": block_m}
    grid = triton.cdiv(length, block_m), batch_size * n_heads
    cos_batch_stride = 0 if cos.shape[0] == 1 else cos.stride(0)
    strides = *x.stride()[:3], cos_batch_stride
    launch(_attention_pre_rotate_kernel, grid, x, cos, sin, out, *strides, length, n_heads, **sizes, num_warps=4)
    return out
