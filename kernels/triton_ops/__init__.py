"""The Triton implementations, gathered; what is not here yet is torch's."""

from kernels.torch_ops import (
    add_layer_norm,
    attention,
    gated_mlp,
    gelu,
    layer_norm,
    rope,
)
from kernels.triton_ops.cross_entropy import cross_entropy, cross_entropy_step, scale_
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "cross_entropy_step",
    "gated_mlp",
    "gelu",
    "layer_norm",
    "rms_norm",
    "rope",
    "scale_",
]
