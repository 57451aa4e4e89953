"""The Triton implementations, gathered; what is not here yet is torch's."""

from kernels.torch_ops import (
    add_layer_norm,
    attention,
    cross_entropy,
    gated_mlp,
    gelu,
    layer_norm,
    linear_cross_entropy,
    rope,
)
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "gated_mlp",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
]
