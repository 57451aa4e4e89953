"""The hot operations of the models, each in Triton and in torch.

Importing this package loads neither Triton nor a GPU driver.

cpu_attention  attention of short rows in bf16 on a CPU
dispatch       chooses between the Triton kernels and torch
launch         starts a Triton kernel; the product that all kernels use
linear_ce      cross-entropy of a linear layer, in chunks of tokens
ops            the public functions
philox         dropout masks from the Philox generator
reference      the definition of each op in plain torch, which tests compare with
requirements   what Triton's kernels need of a GPU and its host
segments       document ids of packed rows
torch_ops      the ops on torch's own functions
triton_ops     the ops in Triton
tuning         tile sizes, measured and kept on disk

The public functions, imported here:

    attention             queries over keys and values: causal or full, grouped heads, packed documents
    layer_norm, rms_norm  and their residual forms add_layer_norm, add_rms_norm
    dropout               with a mask that is a function of its seed; the residual forms fuse it
    rope                  rotary position embedding
    bias_gelu, gated_mlp  the two activations of an MLP
    cross_entropy         loss as (sum, count); linear_cross_entropy fuses the output matrix

``use`` and ``force`` choose between Triton and torch. Statistics and losses are computed in float32, or in float64 for
float64 inputs, whatever the dtype of the inputs.
"""

from kernels.dispatch import Choice, force, measuring_tiles, use
from kernels.ops import (
    add_layer_norm,
    add_rms_norm,
    attention,
    bias_gelu,
    cross_entropy,
    dropout,
    gated_mlp,
    layer_norm,
    linear_cross_entropy,
    linear_cross_entropy_by_target,
    rms_norm,
    rope,
)
from kernels.philox import Dropout
from kernels.segments import Segments
from kernels.torch_ops import RopeTable, rope_table

__all__ = [
    "Choice",
    "Dropout",
    "RopeTable",
    "Segments",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "dropout",
    "force",
    "gated_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_by_target",
    "measuring_tiles",
    "rms_norm",
    "rope",
    "rope_table",
    "use",
]
