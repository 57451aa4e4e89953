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
    """(sum, count) of the loss of hidden (N, D) @ weight (V, D)^T at targets (N,), ``rows`` tokens at a time."""
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
                log_probs = F.log_softmax(wide(F.linear(hidden[part], weight)), -1)
                trained = (targets[part] != ignore_index)[:, None]
                chosen = torch.where(trained, targets[part, None], 0)
                total -= torch.where(trained, log_probs.gather(-1, chosen), 0).sum()
                if not (for_hidden or for_weight):
                    continue
                # softmax minus one-hot where trained, in the place of the log-probabilities, which are used up
                one_hot = torch.ones_like(chosen, dtype=log_probs.dtype)
                grad_logits = log_probs.exp_().scatter_add_(-1, chosen, -one_hot).mul_(trained).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is None:
                    continue
                if grad_weight.dtype == grad_logits.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden[part])
                else:
                    grad_weight += grad_logits.T @ hidden[part]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.grads = grad_hidden, grad_weight  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else (g * grad).to(g.dtype) for g in ctx.grads)  # type: ignore[attr-defined]
        return *grads, None, None, None
