"""Attention in Triton: forward and backward kernels, and the custom ops that torch sees; or torch's own, if faster.

interface       the public function, the registered custom ops and their autograd formula
problem         the arguments that all kernels share, and the choice of their tile sizes
tiles           device functions: tile order, visible ranges, loads, rotary embedding of a tile
forward         output and log-sum-exp; keys split over programs for decoding
backward_q      gradient of the queries, and what the other backward kernels read
backward_kv     gradients of the keys and values
backward_bias   gradient of the additive bias
pre_rotate      rotary embedding of the keys into a copy, before the kernels that read them repeatedly
torch_backends  cuDNN's and flash attention of torch: where they compute the same, and the choice by measurement
"""
