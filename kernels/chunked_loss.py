"""Cross-entropy of a linear layer in chunks of tokens: the logits of all tokens never exist at once.

A chunk's logits are made, turned into their own gradient and used up before the next chunk's are made, so the
backward pass has nothing to recompute: it scales the gradients that the forward pass left (the order of
Liger-Kernel's fused linear cross-entropy; Hsu et al. 2024). The gradient of a sum is of order one per place, so low
precision loses nothing to scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from kernels.reference import wide


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Loss of hidden (N, D) @ weight (V, D)^T at targets (N,): (sum, count), with the logits of ``rows`` tokens at a
    time."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = _ChunkedLinearCrossEntropy.apply(hidden, weight, targets, ignore_index, rows)
    return total, (targets != ignore_index).sum()


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, rows: int) -> Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide(weight).dtype) if for_weight else None
        total = wide(hidden).new_zeros(())
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                logits = wide(F.linear(hidden[part], weight))
                total += F.cross_entropy(logits, targets[part], ignore_index=ignore_index, reduction="sum")
                if grad_hidden is None and grad_weight is None:
                    continue
                grad_logits = _grad_logits(logits, targets[part], ignore_index).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ hidden[part]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.grads = grad_hidden, grad_weight  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else (g * grad).to(g.dtype) for g in ctx.grads)  # type: ignore[attr-defined]
        return *grads, None, None, None


def _grad_logits(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Softmax minus one-hot where trained, zero where ignored: (rows, V)."""
    trained = targets != ignore_index
    grad = logits.softmax(-1)
    grad[torch.arange(len(targets), device=grad.device), torch.where(trained, targets, 0)] -= 1
    return grad.mul_(trained[:, None])
