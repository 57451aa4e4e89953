"""The Triton implementations, gathered."""

from kernels.triton_ops.attention.attention import attention
from kernels.triton_ops.bias_gelu import bias_gelu
from kernels.triton_ops.cross_entropy import cross_entropy
from kernels.triton_ops.dropout import dropout
from kernels.triton_ops.gated_mlp import gated_mlp
from kernels.triton_ops.layer_norm import add_layer_norm, layer_norm
from kernels.triton_ops.linear_ce_chunk import cross_entropy_step, scale_
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm
from kernels.triton_ops.rope import rope

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_step",
    "dropout",
    "gated_mlp",
    "layer_norm",
    "rms_norm",
    "rope",
    "scale_",
]
