"""Cross-entropy of rows of logits, with label smoothing and z-loss.

    loss = lse - (1 - s) x[target] - s mean(x) + z lse^2,  lse = logsumexp(x)
    gradient by x = (1 + 2 z lse) softmax(x) - s / V - (1 - s) one_hot(target)

logits (N, V) of any row stride, targets (N,) -> losses (N,). Label smoothing s is that of Szegedy et al. 2016, z-loss
that of PaLM (section 5). A row whose target is ``ignore_index`` costs 0, one whose target is outside the vocabulary
NaN. The forward pass takes some rows per program and walks over the vocabulary in blocks, keeping the largest logit,
the sum of exponentials relative to it (online softmax, Milakov and Gimelshein 2018) and the sum of logits. The backward
pass has a program per block; it reads lse and the logits once and writes the gradient once. Losses are summed by torch,
in a fixed order; there are no atomics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import INTERPRETED, launch
from kernels.tuning import Tiles, best_tiles

# ---------------------------------------------------------------------------------------------------- device functions


@triton.jit
def row_statistics(
    row_ptr,  # (BLOCK_R,) pointers to the first logit of each row
    not_ignored,  # (BLOCK_R,) rows to read; the results of the others are meaningless
    vocab,
    SMOOTHING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """(largest logit, sum of exp(logit - largest), sum of logits if SMOOTHING > 0), each (BLOCK_R,)."""
    max_logit = tl.full((BLOCK_R,), float("-inf"), ACC_DTYPE)
    exp_sum = tl.zeros((BLOCK_R,), ACC_DTYPE)
    logit_sum = tl.zeros((BLOCK_R,), ACC_DTYPE)
    for start in range(0, vocab, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)[None, :]
        inside = not_ignored[:, None] & (column < vocab)
        tile = tl.load(row_ptr[:, None] + column, mask=inside, other=float("-inf")).to(ACC_DTYPE)
        new_max = tl.maximum(max_logit, tl.max(tile, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf while all logits were -inf
        exp_sum = exp_sum * tl.exp(max_logit - finite_max) + tl.sum(tl.exp(tile - finite_max[:, None]), 1)
        if SMOOTHING > 0:
            logit_sum += tl.sum(tl.where(inside, tile, 0.0), 1)
        max_logit = new_max
    return tl.where(not_ignored, max_logit, 0.0), tl.where(not_ignored, exp_sum, 1.0), logit_sum


@triton.jit
def row_losses(max_logit, exp_sum, logit_sum, target_logit, vocab, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):
    """(loss, lse) of each row; subtracts logits, which are alike in size, before the logarithm, for precision."""
    losses = (max_logit - target_logit) + tl.log(exp_sum)
    lse = max_logit + tl.log(exp_sum)
    if SMOOTHING > 0:
        losses += SMOOTHING * (target_logit - logit_sum / vocab)
    if Z_LOSS > 0:
        losses += Z_LOSS * lse * lse
    return losses, lse


@triton.jit
def row_targets(
    program,
    targets_ptr,  # (N,)
    n_rows,
    vocab,
    ignore_index,
    BLOCK_R: tl.constexpr,
):
    """(row index, row exists, target, not ignored, not ignored and in the vocabulary), each (BLOCK_R,)."""
    row = program.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < n_rows
    target = tl.load(targets_ptr + row, mask=exists, other=ignore_index)
    not_ignored = target != ignore_index
    return row, exists, target, not_ignored, not_ignored & (target >= 0) & (target < vocab)


@triton.jit
def row_gradient(tile, shift, factor, one_hot, vocab, SMOOTHING: tl.constexpr):
    """Gradient by logits: factor * exp(tile - shift) - smoothing / V, minus 1 - smoothing where ``one_hot``.

    tile and one_hot are (BLOCK_R, BLOCK_V), shift and factor (BLOCK_R, 1).
    """
    grad = factor * tl.exp(tile - shift)
    if SMOOTHING > 0:
        grad -= tl.full((1, 1), SMOOTHING, grad.dtype) / vocab
    return tl.where(one_hot, grad - (1 - SMOOTHING), grad)


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _cross_entropy_forward_kernel(
    logits_ptr,  # (N, V)
    targets_ptr,  # (N,)
    losses_ptr,  # (N,), written
    lse_ptr,  # (N,), written
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
    tl.store(lse_ptr + row, tl.where(not_ignored, lse, 0.0), mask=exists)


@triton.jit
def _cross_entropy_backward_kernel(
    grad_losses_ptr,  # (N,)
    logits_ptr,  # (N, V)
    targets_ptr,  # (N,)
    lse_ptr,  # (N,)
    grad_logits_ptr,  # (N, V), written, contiguous
    grad_losses_row_stride,
    logits_row_stride,
    n_rows,
    vocab,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    row, exists, target, not_ignored, in_vocab = row_targets(
        tl.program_id(0), targets_ptr, n_rows, vocab, ignore_index, BLOCK_R
    )
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    inside = column < vocab
    grad_loss = tl.load(grad_losses_ptr + row * grad_losses_row_stride, mask=not_ignored, other=0.0).to(ACC_DTYPE)
    grad_loss = tl.where(not_ignored & (in_vocab == 0), float("nan"), grad_loss)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    logits_tile_ptr = logits_ptr + (row * logits_row_stride)[:, None] + column
    tile = tl.load(logits_tile_ptr, mask=not_ignored[:, None] & inside, other=0.0).to(ACC_DTYPE)
    grad = row_gradient(
        tile, lse[:, None], (1 + 2 * Z_LOSS * lse)[:, None], column == target[:, None], vocab, SMOOTHING
    )
    grad = tl.where(not_ignored[:, None], grad * grad_loss[:, None], 0.0)
    grad_tile_ptr = grad_logits_ptr + (row * vocab)[:, None] + column
    tl.store(grad_tile_ptr, grad.to(grad_logits_ptr.dtype.element_ty), mask=exists[:, None] & inside)


# ---------------------------------------------------------------------------------------------------------- custom ops


def _tile_candidates(n_rows: int, vocab: int) -> list[Tiles]:
    """Tiles for (n_rows, vocab) logits, the default first: a block of the vocabulary and rows that fill a program."""
    width = triton.next_power_of_2(max(vocab, 16))
    if INTERPRETED:  # time in the interpreter goes by the number of operations, not by their size
        size = 1 << 18
        block_r = min(triton.next_power_of_2(n_rows), max(1, size // width))
        return [{"BLOCK_R": block_r, "BLOCK_V": min(width, size), "num_warps": 4}]
    candidates = []
    for size, warps in ((8192, 8), (4096, 4), (4096, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)):
        if width >= size or size == 4096:  # narrow rows share a program
            block_r = max(1, min(16, size // width))
            candidates.append({"BLOCK_R": block_r, "BLOCK_V": min(width, size), "num_warps": warps})
    return candidates


def best_cross_entropy_tiles(op: str, logits: Tensor, run: Callable[[Tiles], None]) -> Tiles:
    """The best tiles of ``op`` for logits (N, V) of this size and dtype; ``run`` starts the kernel to measure it."""
    n_rows, vocab = logits.shape
    shape_class = triton.next_power_of_2(max(vocab, 1)), logits.dtype
    return best_tiles(op, shape_class, _tile_candidates(n_rows, vocab), run)


@torch.library.custom_op("trireme::cross_entropy_forward", mutates_args=())
def cross_entropy_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(losses, log-sum-exp) of the rows of logits (N, V), each (N,) float32, or float64 for float64 logits."""
    losses, lse = _row_outputs(logits)
    n_rows, vocab = logits.shape
    targets = targets.contiguous()

    def run(tiles: Tiles) -> None:
        launch(
            _cross_entropy_forward_kernel,
            (triton.cdiv(n_rows, tiles["BLOCK_R"]),),
            *(logits, targets, losses, lse, logits.stride(0), n_rows, vocab, ignore_index),
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **tiles,
        )

    if n_rows:
        run(best_cross_entropy_tiles("cross_entropy_forward", logits, run))
    return losses, lse


@cross_entropy_forward.register_fake
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    return _row_outputs(logits)


def _row_outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised losses and log-sum-exp, (N,) each."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = logits.new_empty(logits.shape[0], dtype=dtype)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("trireme::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """The gradient by logits (N, V), from the gradient ``grad`` (N,) by the losses."""
    grad_logits = logits.new_empty(logits.shape)
    n_rows, vocab = logits.shape
    targets = targets.contiguous()
    strides = grad.stride(0), logits.stride(0)

    def run(tiles: Tiles) -> None:
        launch(
            _cross_entropy_backward_kernel,
            (triton.cdiv(n_rows, tiles["BLOCK_R"]), triton.cdiv(vocab, tiles["BLOCK_V"])),
            *(grad, logits, targets, lse, grad_logits, *strides, n_rows, vocab, ignore_index),
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **tiles,
        )

    if n_rows:
        run(best_cross_entropy_tiles("cross_entropy_backward", logits, run))
    return grad_logits


@cross_entropy_backward.register_fake
def _(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ctx, grad, _):
    if grad is None:  # the losses are unused
        return (None,) * 5
    return cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)


# ----------------------------------------------------------------------------------------------------- public function


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the losses of logits (N, V) at targets (N,): see ``kernels.ops.cross_entropy``."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    losses, _ = cross_entropy_forward(logits, targets, ignore_index, label_smoothing, z_loss)
    return losses.sum(), (targets != ignore_index).sum()
