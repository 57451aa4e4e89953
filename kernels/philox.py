"""Dropout whose mask is a function of (seed, row, column): nothing to store, and the same numbers on every path.

Philox4x32-10 (Salmon et al. 2011), as ``tl.randint4x`` computes it, gives four numbers of 32 bits a call; element (row, column)
of a tensor seen as rows takes number column % 4 of the call whose counter is row * ceil(width / 4) + column // 4. One call for four
elements, because the rounds cost more than the memory traffic they would hide behind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
CHUNK = 1 << 14  # counters at a time: their words stay in the cache


class Dropout(NamedTuple):
    """Zeroes each element with probability ``p`` and divides the others by 1 - p; ``seed`` (0 to 2^63 - 1) is the mask's name."""

    p: float
    seed: int


def dropout(x: Tensor, how: Dropout) -> Tensor:
    """``how`` applied to x (..., D)."""
    return torch.where(keep(x.shape, how, x.device), x * scale(how.p), 0)


def scale(p: float) -> float:
    """What a kept element is multiplied by; 0 where none is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


def threshold(p: float) -> int:
    """An element is kept where its 32 bits, as an unsigned number, are at least this. At p = 1 ``scale`` zeroes what is left."""
    return min(round(p * 2**32), WORD)


def constants(p: float) -> dict[str, int | float]:
    """What the kernels need to know of ``p``: THRESHOLD, 0 for no dropout, and SCALE."""
    return {"THRESHOLD": threshold(p), "SCALE": scale(p)}


def keep(shape: torch.Size, how: Dropout, device: torch.device) -> Tensor:
    """The mask, True where an element of a tensor of ``shape`` is kept."""
    width = shape[-1]
    calls = -(-width // 4)
    counters = torch.arange(shape.numel() // max(width, 1) * calls, device=device)
    bits = [words(how.seed, part) >= threshold(how.p) for part in counters.split(CHUNK)]
    return torch.cat(bits).view(-1, 4 * calls)[:, :width].reshape(shape)


def words(seed: int, counters: Tensor) -> Tensor:
    """(N, 4) int64 of 32 bits each for counters (N,) int64 under the key ``seed``. An int64 product wraps but keeps its bits."""
    c0, c1 = counters & WORD, counters >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (b >> 32).bitwise_xor_(c1).bitwise_xor_(k0), (a >> 32).bitwise_xor_(c3).bitwise_xor_(k1)
        c0, c1, c2, c3 = c0.bitwise_and_(WORD), b.bitwise_and_(WORD), c2.bitwise_and_(WORD), a.bitwise_and_(WORD)
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return torch.stack((c0, c1, c2, c3), -1)
