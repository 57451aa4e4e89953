"""The hot operations of the models, as public functions. Importing this touches no driver.

    attention             queries over keys and values: causal or full, grouped heads, packed documents
    layer_norm, rms_norm  and their residual forms add_layer_norm, add_rms_norm
    dropout               with a mask that is a function of its seed; the residual forms have it fused in
    rope                  rotary position embedding
    bias_gelu, gated_mlp  the two activations of an MLP
    cross_entropy         loss as (sum, count); linear_cross_entropy has the output matrix fused in

``use`` and ``force`` choose between the Triton kernels and torch. ``kernels.reference`` says what right means; statistics and
losses are float32 at least, whatever comes in.
"""

from kernels.dispatch import Choice, force, measuring, use
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
    "measuring",
    "rms_norm",
    "rope",
    "rope_table",
    "use",
]
