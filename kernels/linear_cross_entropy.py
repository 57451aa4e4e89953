"""Cross-entropy of a linear layer in chunks of tokens: the logits (N, V) of all tokens never exist at once.

A chunk's logits are made, turned into their own gradient in their own memory and used up before the next chunk's are made, so
the backward pass has nothing to recompute: it scales the gradients that the forward pass left (the order of Liger-Kernel's
fused linear cross-entropy; Hsu et al. 2024). The gradient of a sum is of order one per place, so low precision loses nothing
to scaling. The three products are torch's; what lies between them, ``kernels.dispatch`` chooses.

How many tokens a chunk has. Each chunk reads and writes the gradient of the weight (V, D) once, which takes time; and where
that gradient is of low precision, rounds it once. So chunks are large and few: at most ``MOST_CHUNKS``, and none of fewer
than ``LEAST_ROWS`` tokens. Products are summed in float32, so every element of the gradient is off by at most MOST_CHUNKS
half-units in the last place of the largest partial sum; in bfloat16 16 * 2^-9 = 3 %, and some 0.3 % in the mean, as roundings
are independent. A float32 sum would be of twice the size, with a copy of low precision beside it at the end. Memory, beyond
inputs and the two gradients, is the logits of one chunk: N V / 16 numbers from 16 * LEAST_ROWS tokens on.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernels.dispatch as dispatch
from kernels.reference import wide

LEAST_ROWS, MOST_CHUNKS = 1024, 16


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the loss of hidden (N, D) @ weight (V, D)^T at targets (N,); under autocast in its dtype."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    total, *_ = linear_cross_entropy_forward(hidden, weight, targets, ignore_index, label_smoothing, z_loss, *wanted)
    return total, (targets != ignore_index).sum()


@torch.library.custom_op("trireme::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses, its gradient by hidden, by weight), the latter two the backward pass's own; empty if not wanted."""
    total, grad_hidden, grad_weight = _outputs(hidden, weight, for_hidden, for_weight)
    step, tokens, rows = dispatch.ops(hidden).cross_entropy_step, hidden.shape[0], _chunk_rows(hidden.shape[0])
    losses = wide(hidden).new_empty(tokens)
    if not tokens:
        grad_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            logits = torch.mm(hidden[part], weight.T)
            losses[part], grad = step(
                logits, targets[part], ignore_index, label_smoothing, z_loss, for_hidden or for_weight
            )
            if for_hidden:
                torch.mm(grad, weight, out=grad_hidden[part])
            if for_weight:
                torch.addmm(grad_weight, grad.T, hidden[part], beta=float(start > 0), out=grad_weight)
            del logits, grad  # before the next chunk's are made
    return torch.sum(losses, 0, out=total), grad_hidden, grad_weight


@linear_cross_entropy_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden, weight, for_hidden, for_weight)


def _outputs(hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    by_hidden, by_weight = (x.new_empty(x.shape if y else 0) for x, y in ((hidden, for_hidden), (weight, for_weight)))
    return hidden.new_empty((), dtype=dtype), by_hidden, by_weight


def _chunk_rows(tokens: int) -> int:
    return max(LEAST_ROWS, -(-tokens // MOST_CHUNKS))


@torch.library.custom_op("trireme::scaled", mutates_args=())
def scaled(x: Tensor, by: Tensor) -> Tensor:
    """x * by, a number on the same device, which keeps its precision: torch rounds it to the dtype of x first."""
    out = x.clone(memory_format=torch.contiguous_format)
    dispatch.ops(x).scale_(out, by)
    return out


@scaled.register_fake
def _(x: Tensor, by: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)  # else zeros as large as they are would be made for them
    ctx.save_for_backward(*grads)
    ctx.wanted = inputs[-2:]


def _backward(ctx, grad, *_):
    if grad is None:  # nothing comes from the loss
        return (None,) * 8
    grads = (_scaled(x, grad) if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True))
    return *grads, None, None, None, None, None, None


def _scaled(x: Tensor, by: Tensor) -> Tensor:
    """``scaled`` in its own memory, where there is no second backward pass to come, nor a compiler that follows."""
    if torch._C._autograd._get_current_graph_task_keep_graph() or type(x) is not Tensor:
        return scaled(x, by)
    dispatch.ops(x).scale_(x, by)
    return x


linear_cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)
