"""The public ops in Triton, with the signatures of ``kernels.torch_ops``.

activations       GELU and SiLU with their derivatives, for fused kernels
attention         a package: forward and backward kernels of attention
bias_gelu         gelu(x + bias)
cross_entropy     cross-entropy of logits that are in memory
dropout           dropout alone
gated_mlp         activation(gate) * up, of SwiGLU and GeGLU
layer_norm        LayerNorm, alone and with dropout and residual add
linear_ce_chunk   loss and gradient of a chunk of logits, for ``kernels.linear_ce``
rms_norm          RMSNorm, alone and with dropout and residual add
rope              rotary position embedding
rows              shared by the row-wise kernels: tile choices, dropout mask, column sums

An op has one file, in this order and by these names: ``_x_forward_kernel`` and ``_x_backward_kernel``; the custom ops
``x_forward`` and ``x_backward`` that launch them; ``_setup_context`` and ``_backward``, which make them differentiable;
and the public function ``x``. An op that is its own backward pass has one ``_x_kernel`` and one custom op, ``x_op``.
"""

from kernels.triton_ops.attention.interface import attention
from kernels.triton_ops.bias_gelu import bias_gelu
from kernels.triton_ops.cross_entropy import cross_entropy
from kernels.triton_ops.dropout import dropout
from kernels.triton_ops.gated_mlp import gated_mlp
from kernels.triton_ops.layer_norm import add_layer_norm, layer_norm
from kernels.triton_ops.linear_ce_chunk import cross_entropy_with_grad, scale_
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm
from kernels.triton_ops.rope import rope

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_with_grad",
    "dropout",
    "gated_mlp",
    "layer_norm",
    "rms_norm",
    "rope",
    "scale_",
]
