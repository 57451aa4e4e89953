"""Cross-entropy of a linear layer in chunks of tokens.

The logits (N, V) of all tokens never exist at once: the logits of a chunk are computed, replaced in place by their
gradient and consumed before those of the next chunk, so the backward pass recomputes nothing: it scales the gradients
that the forward pass left (the method of Liger-Kernel's fused linear cross-entropy; Hsu et al. 2024). The gradient of a
sum is of order one per token, so low precision loses nothing to scaling. The three matrix products are torch's;
``kernels.dispatch`` chooses what runs between them.

Chunk size. Each chunk reads and writes the gradient of the weight (V, D) once, which takes time, and rounds it once if
it is of low precision. So chunks are few and large: at most ``MAX_CHUNKS``, none of fewer than ``MIN_CHUNK_TOKENS``
tokens. Products are summed in float32, so every element of the gradient is off by at most MAX_CHUNKS half-units in the
last place of the largest partial sum: in bfloat16 16 * 2^-9 = 3 %, on average some 0.3 %, as roundings are independent.
A float32 sum would take twice the memory, and a low-precision copy beside it at the end. Beyond the inputs and the two
gradients, the memory needed is the logits of one chunk: N V / 16 numbers from 16 * MIN_CHUNK_TOKENS tokens on.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernels.dispatch as dispatch

MIN_CHUNK_TOKENS, MAX_CHUNKS = 1024, 16


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, count) of the losses of hidden (N, D) @ weight (V, D)^T at targets (N,), and the losses (N,) themselves.

    Under autocast in its dtype. The single losses have no gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    total, *_, losses = linear_cross_entropy_forward(
        hidden, weight, targets, ignore_index, label_smoothing, z_loss, *needs_grad
    )
    return total, (targets != ignore_index).sum(), losses


@torch.library.custom_op("trireme::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of losses (), gradients of hidden (N, D) and weight (V, D), losses (N,)); (0,) for a gradient not needed.

    The gradients belong to the backward pass, which may scale them in place.
    """
    total, grad_hidden, grad_weight, losses = _outputs(hidden, weight, needs_hidden_grad, needs_weight_grad)
    cross_entropy_with_grad = dispatch.implementation(hidden).cross_entropy_with_grad
    needs_grad = needs_hidden_grad or needs_weight_grad
    n_tokens = hidden.shape[0]
    chunk_tokens = tokens_per_chunk(n_tokens)
    if not n_tokens:
        grad_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n_tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = torch.mm(hidden[chunk], weight.T)
            losses[chunk], grad = cross_entropy_with_grad(
                logits, targets[chunk], ignore_index, label_smoothing, z_loss, needs_grad
            )
            if needs_hidden_grad:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if needs_weight_grad:
                torch.addmm(grad_weight, grad.T, hidden[chunk], beta=float(start > 0), out=grad_weight)
            del logits, grad  # free their memory before the next chunk's logits are allocated
    return torch.sum(losses, 0, out=total), grad_hidden, grad_weight, losses


@linear_cross_entropy_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(hidden, weight, needs_hidden_grad, needs_weight_grad)


def _outputs(
    hidden: Tensor, weight: Tensor, needs_hidden_grad: bool, needs_weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised sum of losses, gradients of hidden and weight, (0,) where not needed, and losses."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden_grad else 0)
    grad_weight = weight.new_empty(weight.shape if needs_weight_grad else 0)
    losses = hidden.new_empty(hidden.shape[0], dtype=dtype)
    return hidden.new_empty((), dtype=dtype), grad_hidden, grad_weight, losses


def tokens_per_chunk(n_tokens: int) -> int:
    """Tokens of a chunk, the last one excepted: see the module docstring."""
    return max(MIN_CHUNK_TOKENS, -(-n_tokens // MAX_CHUNKS))


@torch.library.custom_op("trireme::scaled", mutates_args=())
def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, a number on the same device, in the factor's precision: torch would round it to x.dtype."""
    out = x.clone(memory_format=torch.contiguous_format)
    dispatch.implementation(x).scale_(out, factor)
    return out


@scaled.register_fake
def _(x: Tensor, factor: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, *grads, losses = output
    ctx.mark_non_differentiable(*grads, losses)
    ctx.set_materialize_grads(False)  # else zeros as large as the gradients would be allocated
    ctx.save_for_backward(*grads)
    ctx.needs_grad = inputs[-2:]


def _backward(ctx, grad, *_):
    if grad is None:  # the loss is unused
        return (None,) * 8
    saved = zip(ctx.saved_tensors, ctx.needs_grad, strict=True)
    grads = (_scale_saved(x, grad) if needs_grad else None for x, needs_grad in saved)
    return *grads, None, None, None, None, None, None


def _scale_saved(x: Tensor, factor: Tensor) -> Tensor:
    """``scaled`` in place if x is not read again: no retained graph for a second backward pass, and no tracing."""
    if torch._C._autograd._get_current_graph_task_keep_graph() or type(x) is not Tensor:
        return scaled(x, factor)
    dispatch.implementation(x).scale_(x, factor)
    return x


linear_cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)
