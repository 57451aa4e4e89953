"""Rotary embedding of the side that attention's loops read many times over: queries and keys turned once, into a copy.

The other side is turned as it is loaded, and gradients are turned back before they are stored (``attention_tiles``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.triton_ops.attention.problem import padded
from kernels.triton_ops.attention.tiles import load_halves, rotate


@triton.jit
def _turn_kernel(
    x,  # (B, T, H, Dh)
    cos,  # (B or 1, T, Dh/2)
    sin,
    out,  # (B, T, H, Dh), dense
    x_b,
    x_t,
    x_h,
    cos_b,
    length,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(at, length - 1)
    a, b = load_halves(x + row * x_b + head * x_h, rows.to(tl.int64)[:, None] * x_t, HEAD_DIM, BLOCK_D)
    a, b = rotate(a, b, cos + row * cos_b, sin + row * cos_b, rows, 1.0, HEAD_DIM)
    half = tl.arange(0, BLOCK_D // 2)
    places = out + ((row * length + at) * heads + head)[:, None] * HEAD_DIM + half[None, :]
    kept = (at < length)[:, None] & (half < HEAD_DIM // 2)[None, :]
    tl.store(places, a.to(out.dtype.element_ty), mask=kept)
    tl.store(places + HEAD_DIM // 2, b.to(out.dtype.element_ty), mask=kept)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A copy of x (B, T, H, Dh) in rotary embedding: for the side that a kernel's loop reads many times over."""
    rows, length, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = 64
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_M": size}
    grid, batch = (triton.cdiv(length, size), rows * heads), 0 if cos.shape[0] == 1 else cos.stride(0)
    launch(_turn_kernel, grid, x, cos, sin, out, *x.stride()[:3], batch, length, heads, **sizes, num_warps=4)
    return out
