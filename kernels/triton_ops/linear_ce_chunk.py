"""A chunk of the head's loss in Triton: losses of rows of logits and their gradient in one kernel; and the gradient's scaling.

As ``kernels.triton_ops.cross_entropy``, but the gradient takes the place of the logits (N, V), which are read twice and
written once. The second pass goes backwards, so that it begins with what the caches still hold of the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import INTERPRETED, launch
from kernels.reference import wide
from kernels.triton_ops.cross_entropy import (
    best_tiles,
    cross_entropy_forward,
    row_gradient,
    row_losses,
    row_statistics,
    row_targets,
)
from kernels.tuning import Tiles


@triton.jit
def _cross_entropy_step_kernel(
    logits_ptr,  # (N, V), rows stride apart
    targets_ptr,  # (N,)
    losses_ptr,  # (N,)
    out_ptr,  # (N, V), rows stride apart: the gradient of the losses' sum; may be logits itself
    stride,
    rows,
    vocab,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    WIDE: tl.constexpr = losses_ptr.dtype.element_ty
    row, exists, target, trained, legal = row_targets(tl.program_id(0), targets_ptr, rows, vocab, ignore_index, ROWS)
    x = logits_ptr + row * stride
    at_target = tl.load(x + target, mask=legal, other=float("nan")).to(WIDE)
    largest, total, plain = row_statistics(x, trained, vocab, SMOOTHING, ROWS, COLS, WIDE)
    losses, lse = row_losses(largest, total, plain, at_target, vocab, SMOOTHING, Z_LOSS)
    tl.store(losses_ptr + row, tl.where(trained, losses, 0.0), mask=exists)
    factor = tl.where(trained & (legal == 0), float("nan"), (1 + 2 * Z_LOSS * lse) / total)
    tl.debug_barrier()  # no warp overwrites what another has yet to read
    blocks = tl.cdiv(vocab, COLS)
    for block in range(blocks):
        column = (blocks - 1 - block) * COLS + tl.arange(0, COLS)[None, :]
        inside = column < vocab
        tile = tl.load(x[:, None] + column, mask=trained[:, None] & inside, other=0.0).to(WIDE)
        grad = row_gradient(tile, largest[:, None], factor[:, None], column == target[:, None], vocab, SMOOTHING)
        grad = tl.where(trained[:, None], grad, 0.0)
        tl.store(
            out_ptr + (row * stride)[:, None] + column, grad.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside
        )


@triton.jit
def _scale_kernel(
    x_ptr,  # (n,)
    by_ptr,  # one number
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(by_ptr)
    tl.store(x_ptr + at, (tl.load(x_ptr + at, mask=at < n).to(by.dtype) * by).to(x_ptr.dtype.element_ty), mask=at < n)


def cross_entropy_step(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(the loss of each row of logits (N, V), its gradient or None), not by autograd; ``logits`` becomes the gradient."""
    if not gradient:
        return cross_entropy_forward(logits, targets, ignore_index, label_smoothing, z_loss)[0], None
    rows, vocab = logits.shape
    losses = wide(logits).new_empty(rows)
    targets = targets.contiguous()

    def run(tiles: Tiles, out: Tensor) -> None:
        launch(
            _cross_entropy_step_kernel,
            (triton.cdiv(rows, tiles["ROWS"]),),
            *(logits, targets, losses, out, logits.stride(0), rows, vocab, ignore_index),
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **tiles,
        )

    run(best_tiles("cross_entropy_step", logits, lambda tiles: run(tiles, torch.empty_like(logits))), logits)
    return losses, logits


def scale_(x: Tensor, by: Tensor) -> None:
    """x *= by, a number on the same device: the product is made in the dtype of ``by``."""
    block = 1 << 18 if INTERPRETED else 4096
    if x.numel():
        launch(_scale_kernel, (triton.cdiv(x.numel(), block),), x, by, x.numel(), BLOCK=block, num_warps=8)
