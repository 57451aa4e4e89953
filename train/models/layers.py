"""Layers shared by the Transformer families: linear layers, norms, attention, MLPs, dropout.

Every parameter is read inside the forward of the module that owns it, and nowhere else: under ZeRO-3 it is whole only
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from train.batch import Batch
from train.config.keys.decoder import Decoder
from train.config.keys.encdec import EncDec
from train.config.keys.encoder import Encoder

Sizes = Decoder | Encoder | EncDec
"""Keys of the families that are built from these layers."""


class Linear(nn.Linear):
    """Linear layer whose weight starts as normal(0, init_std): one deviation, or one per output (outputs, 1)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, init_std: float | Tensor) -> None:
        self.init_std = init_std
        super().__init__(inputs, outputs, bias)

    def reset_parameters(self) -> None:
        """Do nothing: ``init_weights`` fills the weights; drawing twice would double a large model's start-up."""


class Embedding(nn.Embedding):
    """Lookup table (rows, width) whose weight starts as normal(0, init_std)."""

    def __init__(self, rows: int, width: int, init_std: float) -> None:
        self.init_std = init_std
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        """Do nothing, as ``Linear.reset_parameters``."""


class Norm(nn.Module):
    """LayerNorm or RMSNorm, fused with the dropout and residual add before it."""

    def __init__(self, model: Sizes) -> None:
        super().__init__()
        self.kind = model.norm
        self.eps = model.norm_eps
        self.p = model.dropout
        self.weight = nn.Parameter(torch.ones(model.width))
        self.bias = nn.Parameter(torch.zeros(model.width)) if model.bias and model.norm == "layer_norm" else None

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(s), s), s = x + dropout(delta): the residual stream x (B, T, D) and the last layer's output delta."""
        if self.kind == "rms_norm":
            if delta is None:
                return kernels.rms_norm(x, self.weight, self.eps), x
            return kernels.add_rms_norm(delta, x, self.weight, self.eps, draw_dropout(self.p, self.training))
        if delta is None:
            return kernels.layer_norm(x, self.weight, self.bias, self.eps), x
        return kernels.add_layer_norm(delta, x, self.weight, self.bias, self.eps, draw_dropout(self.p, self.training))


def run_part(module: nn.Module, again: bool, *inputs: Any) -> Any:
    """``module(*inputs)``; with ``again`` only its inputs are kept for the backward pass, which runs it once more."""
    if again and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


@dataclass(frozen=True)
class AttentionContext:
    """Inputs that all attention layers of one forward pass share, computed once.

    ``ends`` (B,) is set when decoding: the number of keys in each row's cache, ``longest`` being the largest of them.
    """

    rope: kernels.RopeTable | None = None
    segments: kernels.Segments | None = None
    ends: Tensor | None = None
    longest: int = 0
    bias: Tensor | None = None


class KVCache:
    """Keys and values (B, capacity, Hkv, Dh) of one attention layer, allocated at the first write."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: Tensor
        self.values: Tensor

    def start(self, k: Tensor, v: Tensor) -> None:
        """Store the prompt's keys and values, (B, T, Hkv, Dh) with T <= capacity."""
        shape = k.shape[0], self.capacity, *k.shape[2:]
        self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        self.keys[:, : k.shape[1]] = k
        self.values[:, : v.shape[1]] = v

    def append(self, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Write one key and value (B, 1, Hkv, Dh) at the end of each row; return views up to the longest row's end."""
        assert context.ends is not None
        rows = torch.arange(k.shape[0], device=k.device)
        self.keys[rows, context.ends] = k[:, 0]
        self.values[rows, context.ends] = v[:, 0]
        return self.keys[:, : context.longest + 1], self.values[:, : context.longest + 1]

    def rows(self, index: Tensor) -> KVCache:
        """A copy of the cache whose row i is row index[i] of this one."""
        chosen = KVCache(self.capacity)
        chosen.keys, chosen.values = self.keys[index], self.values[index]
        return chosen


class Attention(nn.Module):
    """Multi-head self-attention with grouped key-value heads; no dropout on the attention weights."""

    def __init__(self, model: Sizes, causal: bool = True) -> None:
        super().__init__()
        self.heads = model.heads
        self.kv_heads = model.kv_heads or model.heads
        self.head_dim = model.head_dim or model.width // model.heads
        self.causal, self.scale = causal, None if model.scaled else 1.0
        inner = self.heads * self.head_dim
        projected = inner + 2 * self.kv_heads * self.head_dim
        self.qkv = Linear(model.width, projected, model.bias, qkv_std(model, inner, projected))
        self.out = Linear(inner, model.width, model.bias, residual_std(model, inner))

    def forward(self, x: Tensor, context: AttentionContext, cache: KVCache | None = None) -> Tensor:
        """X (B, T, D) -> (B, T, D). With a cache, a prompt fills it, and later tokens (T = 1) read and extend it."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        rope, decoding = context.rope, context.ends is not None
        if rope is not None and cache is not None:  # a cache holds keys with RoPE applied
            q, k, rope = kernels.rope(q, rope), kernels.rope(k, rope), None
        if cache is not None and decoding:
            k, v = cache.append(k, v, context)
        elif cache is not None:
            cache.start(k, v)
        options: dict[str, Any] = {"segments": context.segments, "bias": context.bias, "rope": rope}
        y = kernels.attention(q, k, v, causal=self.causal and not decoding, scale=self.scale, **options)
        return self.out(y.flatten(-2))


class ActivatedLinear(Linear):
    """Linear layer with its activation: GELU (fused with the bias; also for gated models), sigmoid, tanh or ReLU."""

    def __init__(self, model: Sizes, outputs: int) -> None:
        super().__init__(model.width, outputs, model.bias, model.deviation(model.width))
        self.activation = "gelu" if model.activation in GATES else model.activation

    def forward(self, x: Tensor) -> Tensor:
        """X (..., inputs) -> (..., outputs)."""
        if self.activation == "gelu":
            return kernels.bias_gelu(F.linear(x, self.weight), self.bias)
        return ACTIVATIONS[self.activation](super().forward(x))


ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "gelu_exact": F.gelu}
GATES: dict[str, Literal["silu", "gelu"]] = {"swiglu": "silu", "geglu": "gelu"}


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, model: Sizes) -> None:
        super().__init__()
        inner = model.mlp_width or 4 * model.width
        self.up = ActivatedLinear(model, inner)
        self.down = Linear(inner, model.width, model.bias, residual_std(model, inner))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        return self.down(self.up(x))


class GatedMLP(nn.Module):
    """MLP with a multiplicative gate, gate and up in one projection: SwiGLU and GeGLU (Shazeer 2020)."""

    def __init__(self, model: Sizes) -> None:
        super().__init__()
        inner = model.mlp_width or 4 * model.width
        self.gate: Literal["silu", "gelu"] = GATES[model.activation]
        self.gate_up = Linear(model.width, 2 * inner, model.bias, model.deviation(model.width))
        self.down = Linear(inner, model.width, model.bias, residual_std(model, inner))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(kernels.gated_mlp(gate, up, self.gate))


def build_mlp(model: Sizes) -> MLP | GatedMLP:
    """The MLP that the configuration's activation asks for, gated or plain."""
    return GatedMLP(model) if model.activation in GATES else MLP(model)


def linear_weights(module: nn.Module) -> int:
    """Number of weights in all linear layers of a module; each takes part in one multiply-add per token."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def last_token(hidden: Tensor, batch: Batch) -> Tensor:
    """Hidden state (B, D) of each row's last token that is not padding; of an empty row, the first position."""
    ends = (batch["segments"] > 0).sum(1).clamp(min=1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), ends]


def residual_std(model: Sizes, inputs: int) -> float:
    """Initial deviation of a projection into the residual stream: init_std / sqrt(2 * layers), as GPT-2 (section 2.3).

    Megatron-LM starts Llama the same way (``scaled_init_method_normal``). Post-norm models (BERT) use init_std, and T5
    uses the deviation of any other layer.
    """
    std = model.deviation(inputs)
    return std / math.sqrt(2 * model.layers) if model.norm_first and model.init_std is not None else std


def query_std(model: Sizes, head_dim: int) -> float:
    """Initial deviation of query weights: smaller by sqrt(head_dim) in T5, which does not scale its scores."""
    std = model.deviation(model.width)
    return std if model.scaled or model.init_std is not None else std * head_dim**-0.5


def qkv_std(model: Sizes, inner: int, projected: int) -> float | Tensor:
    """Initial deviation of the fused projection of ``projected`` outputs: ``inner`` queries, then keys and values."""
    std, query = model.deviation(model.width), query_std(model, inner // model.heads)
    if query == std:
        return std
    return torch.where(torch.arange(projected, device="cpu") < inner, query, std)[:, None]


_dropout_off: list[bool] = []
"""Not empty inside ``without_dropout``."""


def draw_dropout(p: float, training: bool) -> kernels.Dropout | None:
    """Dropout with a new mask, or None where nothing is dropped.

    The mask's seed is drawn from torch's CPU generator: the loop seeds it at each step, activation checkpointing
    replays it, and no device is synchronised.
    """
    return kernels.Dropout(p, int(torch.randint(2**63 - 1, ()))) if p and training and not _dropout_off else None


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped in training: neither here nor between the recurrent layers of ``module``."""
    recurrent = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    rates = [part.dropout for part in recurrent]
    _dropout_off.append(True)
    for part in recurrent:
        part.dropout = 0.0
    try:
        yield
    finally:
        _dropout_off.pop()
        for part, rate in zip(recurrent, rates, strict=True):
            part.dropout = rate


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of x while training; x itself otherwise."""
    mask = draw_dropout(p, training)
    return x if mask is None else kernels.dropout(x, mask)
