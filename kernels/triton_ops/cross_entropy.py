"""Cross-entropy of rows of logits with label smoothing (Szegedy et al. 2016) and z-loss (PaLM, section 5), in Triton.

    loss = lse - (1 - s) x[target] - s mean(x) + z lse^2,  lse = logsumexp(x)
    gradient by x = (1 + 2 z lse) softmax(x) - s / V - (1 - s) one_hot(target)

logits (N, V) of any row stride, targets (N,) -> losses (N,); a row whose target is ``ignore_index`` costs 0, one whose target
is no place of the vocabulary NaN. A program takes some rows and goes through the vocabulary in blocks, keeping the largest
logit, the sum of exponentials below it (Milakov and Gimelshein 2018) and the sum of logits. The backward pass has a program a
block; it reads lse and the logits once and writes the gradient once. Losses are summed by torch, in a fixed order; there are
no atomics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import INTERPRETED, launch
from kernels.tuning import Tiles, best

# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def row_statistics(
    x,  # (ROWS,) pointers to the first logit of each row
    trained,  # (ROWS,) which rows are read; of the others nothing is said
    vocab,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(largest logit, sum of exp(logit - largest), sum of logits where smoothing needs it), each (ROWS,)."""
    largest = tl.full((ROWS,), float("-inf"), WIDE)
    total = tl.zeros((ROWS,), WIDE)
    plain = tl.zeros((ROWS,), WIDE)
    for start in range(0, vocab, COLS):
        column = start + tl.arange(0, COLS)[None, :]
        inside = trained[:, None] & (column < vocab)
        tile = tl.load(x[:, None] + column, mask=inside, other=float("-inf")).to(WIDE)
        higher = tl.maximum(largest, tl.max(tile, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(tile - finite[:, None]), 1)
        if SMOOTHING > 0:
            plain += tl.sum(tl.where(inside, tile, 0.0), 1)
        largest = higher
    return tl.where(trained, largest, 0.0), tl.where(trained, total, 1.0), plain


@triton.jit
def row_losses(largest, total, plain, at_target, vocab, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):
    """(loss, lse) of rows; the difference of like logits is taken before the logarithm is added."""
    losses = (largest - at_target) + tl.log(total)
    lse = largest + tl.log(total)
    if SMOOTHING > 0:
        losses += SMOOTHING * (at_target - plain / vocab)
    if Z_LOSS > 0:
        losses += Z_LOSS * lse * lse
    return losses, lse


@triton.jit
def row_targets(program, targets_ptr, rows, vocab, ignore_index, ROWS: tl.constexpr):
    """(row numbers, which of them exist, targets, which are trained, which of these have a legal target), each (ROWS,)."""
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    target = tl.load(targets_ptr + row, mask=exists, other=ignore_index)
    trained = target != ignore_index
    return row, exists, target, trained, trained & (target >= 0) & (target < vocab)


@triton.jit
def _cross_entropy_forward_kernel(
    logits_ptr,  # (N, V), rows stride apart
    targets_ptr,  # (N,)
    losses_ptr,  # (N,)
    lse_ptr,  # (N,)
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
    tl.store(lse_ptr + row, tl.where(trained, lse, 0.0), mask=exists)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def row_gradient(tile, shift, factor, one_hot, vocab, SMOOTHING: tl.constexpr):
    """Factor * exp(tile - shift) - smoothing / V - (1 - smoothing) where one_hot; tile (ROWS, COLS), the others (ROWS, 1)."""
    grad = factor * tl.exp(tile - shift)
    if SMOOTHING > 0:
        grad -= tl.full((1, 1), SMOOTHING, grad.dtype) / vocab
    return tl.where(one_hot, grad - (1 - SMOOTHING), grad)


@triton.jit
def _cross_entropy_backward_kernel(
    grad_ptr,  # (N,) gradient by the losses, grad_stride apart
    logits_ptr,  # (N, V), rows stride apart
    targets_ptr,  # (N,)
    lse_ptr,  # (N,)
    out_ptr,  # (N, V) contiguous
    grad_stride,
    stride,
    rows,
    vocab,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    row, exists, target, trained, legal = row_targets(tl.program_id(0), targets_ptr, rows, vocab, ignore_index, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = column < vocab
    by = tl.load(grad_ptr + row * grad_stride, mask=trained, other=0.0).to(WIDE)
    by = tl.where(trained & (legal == 0), float("nan"), by)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    tile = tl.load(logits_ptr + (row * stride)[:, None] + column, mask=trained[:, None] & inside, other=0.0).to(WIDE)
    grad = row_gradient(
        tile, lse[:, None], (1 + 2 * Z_LOSS * lse)[:, None], column == target[:, None], vocab, SMOOTHING
    )
    grad = tl.where(trained[:, None], grad * by[:, None], 0.0)
    tl.store(
        out_ptr + (row * vocab)[:, None] + column, grad.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside
    )


# ------------------------------------------------------------------------------------------------------ host functions


def candidates(rows: int, vocab: int) -> list[Tiles]:
    """Tiles for (rows, vocab) logits, the guess first: a block of the vocabulary, and as many rows as fill a program."""
    width = triton.next_power_of_2(max(vocab, 16))
    if INTERPRETED:  # a program costs time by the operation, not by its size
        size = 1 << 18
        return [
            {"ROWS": min(triton.next_power_of_2(rows), max(1, size // width)), "COLS": min(width, size), "num_warps": 4}
        ]
    tiles = []
    for size, warps in ((8192, 8), (4096, 4), (4096, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)):
        if width >= size or size == 4096:  # narrow rows share a program
            tiles.append({"ROWS": max(1, min(16, size // width)), "COLS": min(width, size), "num_warps": warps})
    return tiles


def best_tiles(kernel: str, logits: Tensor, run: Callable[[Tiles], None]) -> Tiles:
    """The best tiles for logits like these; ``run`` is for measuring them."""
    rows, vocab = logits.shape
    return best(kernel, (triton.next_power_of_2(max(vocab, 1)), logits.dtype), candidates(rows, vocab), run)


@torch.library.custom_op("trireme::cross_entropy_forward", mutates_args=())
def cross_entropy_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(losses, lse) of rows of logits (N, V), each (N,) float32, or float64 for float64 logits."""
    losses, lse = _row_outputs(logits)
    rows, vocab = logits.shape
    targets = targets.contiguous()

    def run(tiles: Tiles) -> None:
        launch(
            _cross_entropy_forward_kernel,
            (triton.cdiv(rows, tiles["ROWS"]),),
            *(logits, targets, losses, lse, logits.stride(0), rows, vocab, ignore_index),
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **tiles,
        )

    if rows:
        run(best_tiles("cross_entropy_forward", logits, run))
    return losses, lse


@cross_entropy_forward.register_fake
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    return _row_outputs(logits)


def _row_outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = logits.new_empty(logits.shape[0], dtype=dtype)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("trireme::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """The gradient by logits (N, V) of losses whose own gradient is ``grad`` (N,)."""
    out = logits.new_empty(logits.shape)
    rows, vocab = logits.shape
    targets = targets.contiguous()

    def run(tiles: Tiles) -> None:
        launch(
            _cross_entropy_backward_kernel,
            (triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(vocab, tiles["COLS"])),
            *(grad, logits, targets, lse, out, grad.stride(0), logits.stride(0), rows, vocab, ignore_index),
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **tiles,
        )

    if rows:
        run(best_tiles("cross_entropy_backward", logits, run))
    return out


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
    if grad is None:  # nothing comes from the losses
        return (None,) * 5
    return cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)


# ----------------------------------------------------------------------------------------------------- public function


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of logits (N, V) at targets (N,) in nats: (sum, count) over the places that are not ``ignore_index``."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    losses, _ = cross_entropy_forward(logits, targets, ignore_index, label_smoothing, z_loss)
    return losses.sum(), (targets != ignore_index).sum()
