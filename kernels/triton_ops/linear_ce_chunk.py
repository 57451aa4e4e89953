"""Loss and gradient of a chunk of logits in one kernel, and scaling of a gradient in place.

These are the steps of ``kernels.linear_ce``. The arithmetic is that of ``kernels.triton_ops.cross_entropy``, but the
gradient overwrites the logits (N, V), which are read twice and written once. The second pass over the vocabulary runs
backwards, so that it begins with what the caches still hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import INTERPRETED, launch
from kernels.reference import upcast
from kernels.triton_ops.cross_entropy import (
    best_cross_entropy_tiles,
    cross_entropy_forward,
    row_gradient,
    row_losses,
    row_statistics,
    row_targets,
)
from kernels.tuning import Tiles


@triton.jit
def _cross_entropy_with_grad_kernel(
    logits_ptr,  # (N, V)
    targets_ptr,  # (N,)
    losses_ptr,  # (N,), written
    grad_ptr,  # (N, V), written, with the row stride of logits: gradient of the sum of losses; may be logits itself
    logits_row_stride,
    n_rows,
    vocab,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    ACC_DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    row, exists, target, not_ignored, in_vocab = row_targets(
        tl.program_id(0), targets_ptr, n_rows, vocab, ignore_index, BLOCK_R
    )
    row_ptr = logits_ptr + row * logits_row_stride
    target_logit = tl.load(row_ptr + target, mask=in_vocab, other=float("nan")).to(ACC_DTYPE)
    max_logit, exp_sum, logit_sum = row_statistics(row_ptr, not_ignored, vocab, SMOOTHING, BLOCK_R, BLOCK_V, ACC_DTYPE)
    losses, lse = row_losses(max_logit, exp_sum, logit_sum, target_logit, vocab, SMOOTHING, Z_LOSS)
    tl.store(losses_ptr + row, tl.where(not_ignored, losses, 0.0), mask=exists)
    factor = tl.where(not_ignored & (in_vocab == 0), float("nan"), (1 + 2 * Z_LOSS * lse) / exp_sum)
    tl.debug_barrier()  # no warp overwrites logits that another has yet to read
    n_blocks = tl.cdiv(vocab, BLOCK_V)
    for block in range(n_blocks):
        column = (n_blocks - 1 - block) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        inside = column < vocab
        tile = tl.load(row_ptr[:, None] + column, mask=not_ignored[:, None] & inside, other=0.0).to(ACC_DTYPE)
        grad = row_gradient(tile, max_logit[:, None], factor[:, None], column == target[:, None], vocab, SMOOTHING)
        grad = tl.where(not_ignored[:, None], grad, 0.0)
        grad_tile_ptr = grad_ptr + (row * logits_row_stride)[:, None] + column
        tl.store(grad_tile_ptr, grad.to(grad_ptr.dtype.element_ty), mask=exists[:, None] & inside)


@triton.jit
def _scale_kernel(
    x_ptr,  # (n,), read and written
    factor_ptr,  # a single number
    n,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr)
    scaled = tl.load(x_ptr + index, mask=index < n).to(factor.dtype) * factor
    tl.store(x_ptr + index, scaled.to(x_ptr.dtype.element_ty), mask=index < n)


def cross_entropy_with_grad(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(loss of each row of logits (N, V), its gradient by the row or None), outside autograd; overwrites ``logits``."""
    if not needs_grad:
        return cross_entropy_forward(logits, targets, ignore_index, label_smoothing, z_loss)[0], None
    n_rows, vocab = logits.shape
    losses = upcast(logits).new_empty(n_rows)
    targets = targets.contiguous()

    def run(tiles: Tiles, grad: Tensor) -> None:
        launch(
            _cross_entropy_with_grad_kernel,
            (triton.cdiv(n_rows, tiles["BLOCK_R"]),),
            *(logits, targets, losses, grad, logits.stride(0), n_rows, vocab, ignore_index),
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **tiles,
        )

    def measure(tiles: Tiles) -> None:
        run(tiles, torch.empty_like(logits))  # logits must survive being measured

    run(best_cross_entropy_tiles("cross_entropy_with_grad", logits, measure), logits)
    return losses, logits


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a single number on the same device; the product is computed in the dtype of ``factor``."""
    block = 1 << 18 if INTERPRETED else 4096
    if x.numel():
        launch(_scale_kernel, (triton.cdiv(x.numel(), block),), x, factor, x.numel(), BLOCK=block, num_warps=8)
