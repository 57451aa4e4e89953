"""The activations that kernels fuse, with their slopes."""

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """(gelu(x), its slope), tanh form: 0.5 (1 + tanh(u)) is sigmoid(2 u), which one exp gives without overflow."""
    twice = 1.5957691216057308 * x * (1 + 0.044715 * x * x)  # 2 sqrt(2 / pi)
    share = tl.sigmoid(twice)
    return x * share, share + x * share * (1 - share) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)


@triton.jit
def silu(x):
    """(silu(x), its slope)."""
    share = tl.sigmoid(x)
    return x * share, share * (1 + x * (1 - share))
