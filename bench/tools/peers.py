"""What ours is measured beside, in the same process: torch's own, torch.compile's, FlexAttention, and Liger-Kernel where installed.

Functions take and return what ours do. Liger's are told to keep their inputs where they would overwrite them: a measurement calls
them again and again on the same ones.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import RopeTable

Functions = dict[str, Callable[..., Any]]
EAGER, COMPILED, LIGER = "torch eager", "torch.compile", "liger"
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
LONGEST_MATH = 4096
"""Tokens up to which the scores of all pairs are held whole."""


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile has what it builds with: Triton on a GPU, a C++ compiler on a CPU."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def liger() -> Any:
    """Liger-Kernel's functions, or None where it is not installed; it needs a GPU."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return None
    import liger_kernel.transformers.functional as functions

    return functions


def with_compiled(eager: Callable[..., Any]) -> Functions:
    """A function as it is and compiled, for its very shapes."""
    both = {EAGER: eager}
    if can_compile():
        both[COMPILED] = torch.compile(eager, dynamic=False)
    return both


def attention(gpu: bool, length: int) -> Functions:
    """Each backend of scaled_dot_product_attention that runs on this device."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
        with sdpa_kernel([backend]):
            grouped = q.shape[2] != k.shape[2]
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=grouped
            )
        return out.transpose(1, 2)

    names = list(BACKENDS) if gpu else ["sdpa flash", "sdpa math"]
    if length > LONGEST_MATH:
        names.remove("sdpa math")
    return {name: functools.partial(sdpa, backend=BACKENDS[name]) for name in names}


def packed_attention(ids: Tensor) -> Functions:
    """SDPA with a dense mask of the documents, and FlexAttention compiled for their blocks."""
    place = torch.arange(ids.shape[1], device=ids.device)
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & (place[:, None] >= place)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)

    found: Functions = {"sdpa, dense mask": dense}
    if ids.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (ids[b, q] == ids[b, k]) & (q >= k)

        blocks = create_block_mask(visible, ids.shape[0], None, ids.shape[1], ids.shape[1], device=ids.device)
        flex = torch.compile(flex_attention, dynamic=False)
        found["flex"] = lambda q, k, v: flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(1, 2)
    return found


def norm(op: str) -> Functions:
    """Of ``rms_norm`` and the like, by name."""

    def rms_norm(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, w.shape, w, 1e-5)

    def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, w.shape, w, b, 1e-5)

    def add_rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return rms_norm(total, w), total

    def add_layer_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return layer_norm(total, w, b), total

    eager: Functions = {f.__name__: f for f in (rms_norm, layer_norm, add_rms_norm, add_layer_norm)}
    found = with_compiled(eager[op])
    if theirs := liger():
        made: Functions = {
            "rms_norm": lambda x, w: theirs.liger_rms_norm(x, w, 1e-5, in_place=False),
            "layer_norm": lambda x, w, b: theirs.liger_layer_norm(x, w, b, 1e-5),
            "add_rms_norm": lambda x, r, w: theirs.liger_fused_add_rms_norm(x, r, w, 1e-5, in_place=False),
        }
        found |= {LIGER: made[op]} if op in made else {}
    return found


def activation(op: str) -> Functions:
    """Of ``gated_mlp`` and ``bias_gelu``."""
    if op == "bias_gelu":
        return with_compiled(lambda x, b: F.gelu(x + b, approximate="tanh"))
    found = with_compiled(lambda gate, up: F.silu(gate) * up)
    theirs = liger()  # its backward pass overwrites what the forward pass saved, so it is right only once
    return found | ({LIGER: theirs.liger_swiglu} if theirs else {})


def rope(table: RopeTable) -> Functions:
    """Turning halves, in float32."""

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * table.cos - b * table.sin, b * table.cos + a * table.sin), -1).to(x.dtype)

    return with_compiled(turn)


def cross_entropy(targets: Tensor) -> Functions:
    """The sum over all places. Liger's overwrites the logits by their gradient."""
    found = with_compiled(lambda x: F.cross_entropy(x.float(), targets, reduction="sum"))
    if theirs := liger():
        found[LIGER] = lambda x: theirs.liger_cross_entropy(x, targets, reduction="sum")
    return found


def linear_cross_entropy(targets: Tensor) -> Functions:
    """Logits materialised, in the inputs' dtype and then in float32; and Liger's chunks."""
    found = with_compiled(lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum"))
    if theirs := liger():
        found[LIGER] = lambda h, w: theirs.liger_fused_linear_cross_entropy(h, w, targets, reduction="sum")
    return found
