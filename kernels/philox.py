"""Dropout with a mask that is a function of (seed, row, column), so it is never stored.

Torch and Triton compute the same mask by Philox4x32-10 (Salmon et al. 2011), as ``tl.randint4x`` does: a call gives
four numbers of 32 bits. Element (row, column) of a tensor viewed as rows uses number column % 4 of the call whose
counter is row * ceil(width / 4) + column // 4. One call serves four elements, because the rounds cost more than the
memory traffic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
UINT32_MAX = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
COUNTERS_PER_CHUNK = 1 << 14  # so that the intermediate numbers stay in the cache


class Dropout(NamedTuple):
    """Parameters of dropout: the probability ``p`` of zeroing an element, and the mask's ``seed``, 0 to 2^63 - 1."""

    p: float
    seed: int


def dropout(x: Tensor, params: Dropout) -> Tensor:
    """Zeroes each element of x (..., D) with probability params.p and divides the others by 1 - params.p."""
    return torch.where(dropout_mask(x.shape, params, x.device), x * keep_scale(params.p), 0)


def keep_scale(p: float) -> float:
    """Factor of the elements that are kept: 1 / (1 - p), or 0 for p = 1."""
    return 1 / (1 - p) if p < 1 else 0.0


def keep_threshold(p: float) -> int:
    """Smallest random uint32 for which an element is kept. One in 2^32 is kept at p = 1; ``keep_scale`` zeroes it."""
    return min(round(p * 2**32), UINT32_MAX)


def dropout_constexprs(p: float) -> dict[str, int | float]:
    """Compile-time constants of the Triton kernels: THRESHOLD (0 without dropout) and SCALE."""
    return {"THRESHOLD": keep_threshold(p), "SCALE": keep_scale(p)}


def dropout_mask(shape: torch.Size, params: Dropout, device: torch.device) -> Tensor:
    """Mask of ``shape`` (..., D), True where an element is kept."""
    width = shape[-1]
    calls_per_row = -(-width // 4)
    counters = torch.arange(shape.numel() // max(width, 1) * calls_per_row, device=device)
    chunks = counters.split(COUNTERS_PER_CHUNK)
    kept = [philox_uint32(params.seed, chunk) >= keep_threshold(params.p) for chunk in chunks]
    return torch.cat(kept).view(-1, 4 * calls_per_row)[:, :width].reshape(shape)


def philox_uint32(seed: int, counters: Tensor) -> Tensor:
    """Philox4x32-10: random uint32 numbers (N, 4), held in int64, for counters (N,) int64 and the key ``seed``.

    A product of two uint32 wraps in int64 but keeps its 64 bits.
    """
    c0, c1 = counters & UINT32_MAX, counters >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & UINT32_MAX, seed >> 32 & UINT32_MAX
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (b >> 32).bitwise_xor_(c1).bitwise_xor_(k0), (a >> 32).bitwise_xor_(c3).bitwise_xor_(k1)
        c0, c1 = c0.bitwise_and_(UINT32_MAX), b.bitwise_and_(UINT32_MAX)
        c2, c3 = c2.bitwise_and_(UINT32_MAX), a.bitwise_and_(UINT32_MAX)
        k0, k1 = k0 + WEYL[0] & UINT32_MAX, k1 + WEYL[1] & UINT32_MAX
    return torch.stack((c0, c1, c2, c3), -1)
