"""Attention of short rows in bf16 on a CPU, where torch's flash kernel takes up to four times as long."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.segments import Segments, additive_mask, band_mask

LONGEST_ROW = 512
"""Tokens up to which this is faster than torch's flash kernel; its memory grows with their square, too."""


def is_faster(q: Tensor, k: Tensor, segments: Segments | None, bias: Tensor | None) -> bool:
    """Whether ``self_attention`` can compute the attention of q (B, Tq, H, Dh) over k, and is the faster one."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
        return False
    if bias is not None or q.shape[1] > LONGEST_ROW:
        return False
    return q.shape[1] == k.shape[1] and (segments is None or segments.q is segments.kv)  # so a query sees itself


def self_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Segments | None, window: int | None, scale: float | None
) -> Tensor:
    """Attention of one sequence over itself: see ``kernels.ops.attention``. q (B, T, H, Dh), k and v of Hkv heads."""
    mask = None
    if segments is not None:
        mask = segments.mask(causal, window, torch.float32)
    elif causal or window is not None:
        mask = additive_mask(band_mask(q.shape[1], q.shape[1], causal, window, q.device), torch.float32)
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = Bf16Attention.apply(q, k, v, mask, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return out.transpose(1, 2)


class Bf16Attention(torch.autograd.Function):
    """softmax(q k^T * scale + mask) v in bf16, with scores and softmax in fp32 and all scores in memory.

    q, k, v are (B, H, T, Dh), ``mask`` None or broadcast to (B, 1, T, T), fp32, -inf where a key is hidden. Each query
    sees a key.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """The output (B, H, T, Dh), in the dtype of q."""
        ctx.scale, ctx.shape = scale, q.shape
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        scores = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(scale)
        if mask is not None:
            scores.view(*ctx.shape[:3], -1).add_(mask)
        probs = torch.softmax(scores, -1).to(q.dtype)
        ctx.save_for_backward(q, k, v, probs)
        return torch.bmm(probs, v).view(ctx.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, in their shapes (B, H, T, Dh)."""
        q, k, v, probs = ctx.saved_tensors
        grad = grads[0].reshape(q.shape)
        grad_probs = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype).mul_(ctx.scale)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        grad_v = torch.bmm(probs.transpose(1, 2), grad)
        return *(x.view(ctx.shape) for x in (grad_q, grad_k, grad_v)), None, None
