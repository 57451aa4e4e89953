"""Activation functions for fused kernels, each with its derivative."""

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """(gelu(x), its derivative), tanh form: 0.5 (1 + tanh(u)) is sigmoid(2 u), which one exp gives without overflow."""
    two_u = 1.5957691216057308 * x * (1 + 0.044715 * x * x)  # 2 sqrt(2 / pi)
    gate = tl.sigmoid(two_u)
    return x * gate, gate + x * gate * (1 - gate) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)


@triton.jit
def silu(x):
    """(silu(x), its derivative), where silu(x) = x * sigmoid(x)."""
    gate = tl.sigmoid(x)
    return x * gate, gate * (1 + x * (1 - gate))
