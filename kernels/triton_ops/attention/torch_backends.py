"""Attention by torch's cuDNN and flash kernels, which the tuner takes where they compute the same and are faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

import kernels.tuning as tuning
from kernels.triton_ops.attention.problem import contiguous_rows

TRITON, CUDNN, FLASH = "triton", "cudnn", "flash"
SDP_BACKENDS = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}
KERNELS_ON = (8, 0), (12, 1)
"""Least and greatest compute capability that torch has kernels of both for."""
WIDE_HEADS_ON = (8, 0), (9, 0), (10, 0), (10, 3)
"""Capabilities whose shared memory flash's backward pass of heads wider than 192 fits."""


class AttentionTraits(NamedTuple):
    """All of a call of attention, and of the GPU it runs on, that decides which kernels compute the same."""

    dtype: torch.dtype
    head_dim: int
    groups: int
    kind: str  # "causal", "full", or either of them with documents: "packed causal", "packed full"
    n_queries: int
    n_keys: int
    windowed: bool
    biased: bool
    roped: bool
    scale: float
    capability: tuple[int, int]
    deterministic: bool  # torch.use_deterministic_algorithms


def eligible_backends(traits: AttentionTraits) -> tuple[str, ...]:
    """The implementations that give what the Triton kernels give, up to rounding, these first.

    cuDNN's backward pass has no fixed order of sums; flash takes one where torch is asked to be deterministic. Packed
    rows reach torch's kernels through flash alone.
    """
    least, greatest = KERNELS_ON
    fits = (
        traits.dtype in (torch.bfloat16, torch.float16)
        and traits.head_dim % 8 == 0
        and traits.n_queries == traits.n_keys > 1
        and not (traits.windowed or traits.biased)
        and traits.scale > 0
        and least <= traits.capability <= greatest
    )
    if not fits:
        return (TRITON,)
    backends = [TRITON]
    if traits.head_dim <= 128 and not traits.kind.startswith("packed") and not traits.deterministic:
        backends.append(CUDNN)
    if traits.head_dim <= 192 or (traits.head_dim <= 256 and traits.capability in WIDE_HEADS_ON):
        backends.append(FLASH)
    return tuple(backends)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, offsets: Tensor | None, backend: SDPBackend
) -> Tensor:
    """Attention of q (B, T, H, Dh) over k, v (B, T, Hkv, Dh) by one backend of torch, and no other.

    With ``offsets`` it is that of documents laid end to end, which begin there (``Segments.run_offsets``), by flash
    over variable lengths. The longest is not known without waiting for the device: the length of a row stands for it.
    """
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    if offsets is not None:
        length, window = q.shape[1], (-1, 0) if causal else (-1, -1)
        q_rows, k_rows, v_rows = (x.flatten(0, 1) for x in (q, k, v))
        packed: Any = varlen_attn(
            q_rows, k_rows, v_rows, offsets, offsets, length, length, window_size=window, **options
        )
        return packed.view(q.shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options).transpose(1, 2)


def fastest_backend(
    traits: AttentionTraits, attend: Callable[[str, Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> str:
    """The eligible backend whose forward and backward pass together were measured the fastest; unmeasured: ours.

    ``attend(backend, q, k, v)`` computes the call.
    """
    names = eligible_backends(traits)
    length = 1 << (traits.n_keys - 1).bit_length()
    heads = f"{traits.groups}x{traits.head_dim}"
    extra = ("rope" if traits.roped else "plain"), ("deterministic" if traits.deterministic else "free")
    shape_class = str(traits.dtype).removeprefix("torch."), heads, traits.kind, *extra, length, "|".join(names)

    def run(name: str) -> None:
        # Inside a checkpointed layer, hooks of its own keep what the layer saves for its backward pass: not of this.
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            try:
                out = attend(name, *leaves)
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            except torch.AcceleratorError:
                raise
            except RuntimeError as error:
                if name == TRITON:
                    raise
                raise tuning.CannotRun(str(error)) from error

    return tuning.best_tiles("attention_backend", shape_class, names, run)


def _as_it_is(x: Tensor) -> Tensor:
    return x
