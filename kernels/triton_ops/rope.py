"""Rotary position embedding (Su et al. 2021), in the order of halves that Llama checkpoints of transformers use.

x (B, T, H, Dh) is B * T * H rows of two halves; the angles are those of a token, (B, T, 1, Dh / 2) in float32. A program turns
BLOCK_R rows: heads of a token stand side by side, so the angles come from the cache for all but the first. q and k may be views
into one projection. The gradient is turned back by the same angles: the op is its own backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.torch_ops import RopeTable
from kernels.tuning import Tiles, best


@triton.jit
def _rope_kernel(
    x_ptr,  # (B, T, H, 2 * half)
    cos_ptr,  # (B, T, 1, half)
    sin_ptr,  # (B, T, 1, half)
    out_ptr,  # (B, T, H, 2 * half), dense
    n_rows,  # B * T * H
    length,
    heads,
    half,
    x_batch,  # elements from batch row to batch row
    x_token,
    x_head,
    angle_batch,
    angle_token,
    BACK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows) & (column < half)
    batch, token, head = row // heads // length, row // heads % length, row % heads
    x_at = x_ptr + batch * x_batch + token * x_token + head * x_head + column
    angle = batch * angle_batch + token * angle_token + column
    a = tl.load(x_at, mask=inside, other=0.0).to(wide)
    b = tl.load(x_at + half, mask=inside, other=0.0).to(wide)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(wide)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(wide)
    if BACK:
        sin = -sin
    out_at = out_ptr + row * 2 * half + column
    tl.store(out_at, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_at + half, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("trireme::rope", mutates_args=())
def turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """X (B, T, H, Dh) turned by the angles of cos and sin (B or 1, T, 1, Dh / 2), or ``back`` by them."""
    out = x.new_empty(x.shape)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, length, heads, width = x.shape
    cos, sin = (t.contiguous().expand(rows, -1, -1, -1) for t in (cos, sin))
    sizes = rows * length * heads, length, heads, width // 2
    block = max(triton.next_power_of_2(width // 2), 16)

    def run(tiles: Tiles) -> None:
        grid = (triton.cdiv(sizes[0], tiles["BLOCK_R"]),)
        launch(
            _rope_kernel,
            grid,
            x,
            cos,
            sin,
            out,
            *sizes,
            *x.stride()[:3],
            *cos.stride()[:2],
            BACK=back,
            BLOCK_D=block,
            **tiles,
        )

    if x.numel():
        candidates = [{"BLOCK_R": elements // block, "num_warps": 4} for elements in (2048, 1024, 4096)]
        run(best("rope", (block, x.dtype), candidates, run))
    return out


@turned.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return turned(grad, *ctx.saved_tensors, not ctx.back), None, None, None


turned.register_autograd(_backward, setup_context=_setup_context)


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotary position embedding of x (B, T, H, Dh), computed in float32."""
    return turned(x, table.cos, table.sin, False)
