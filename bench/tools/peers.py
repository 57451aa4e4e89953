"""Peers of the kernels: torch eager and compiled, FlexAttention, and Liger-Kernel where installed.

The functions have the signatures of ours. Liger's run with in-place updates off, because a measurement calls a function
many times on the same inputs.
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
MAX_MATH_LENGTH = 4096
"""Longest row, in tokens, for which SDPA's math backend, with all scores in memory, is measured."""


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile finds its backend: Triton on a GPU, a C++ compiler on a CPU."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def liger() -> Any:
    """Liger-Kernel's functions, or None where it is not installed; it needs a GPU."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return None
    import liger_kernel.transformers.functional as functions

    return functions


def with_compiled(eager: Callable[..., Any]) -> Functions:
    """The function itself, and compiled for static shapes if possible."""
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
    if length > MAX_MATH_LENGTH:
        names.remove("sdpa math")
    return {name: functools.partial(sdpa, backend=BACKENDS[name]) for name in names}


def packed_attention(ids: Tensor) -> Functions:
    """SDPA with a dense mask of the documents, and FlexAttention compiled for their blocks."""
    position = torch.arange(ids.shape[1], device=ids.device)
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & (position[:, None] >= position)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)

    functions: Functions = {"sdpa, dense mask": dense}
    if ids.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (ids[b, q] == ids[b, k]) & (q >= k)

        blocks = create_block_mask(visible, ids.shape[0], None, ids.shape[1], ids.shape[1], device=ids.device)
        flex = torch.compile(flex_attention, dynamic=False)

        def flex_attention_of_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(1, 2)

        functions["flex"] = flex_attention_of_documents
    return functions


def norm(op: str) -> Functions:
    """Peers of a norm, by the name of our op."""

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
    functions = with_compiled(eager[op])
    if liger_functions := liger():
        liger_norms: Functions = {
            "rms_norm": lambda x, w: liger_functions.liger_rms_norm(x, w, 1e-5, in_place=False),
            "layer_norm": lambda x, w, b: liger_functions.liger_layer_norm(x, w, b, 1e-5),
            "add_rms_norm": lambda x, r, w: liger_functions.liger_fused_add_rms_norm(x, r, w, 1e-5, in_place=False),
        }
        functions |= {LIGER: liger_norms[op]} if op in liger_norms else {}
    return functions


def activation(op: str) -> Functions:
    """Peers of ``gated_mlp`` and ``bias_gelu``."""
    if op == "bias_gelu":
        return with_compiled(lambda x, b: F.gelu(x + b, approximate="tanh"))
    functions = with_compiled(lambda gate, up: F.silu(gate) * up)
    liger_functions = liger()  # its backward pass overwrites saved tensors, so only the first result is right
    return functions | ({LIGER: liger_functions.liger_swiglu} if liger_functions else {})


def rope(table: RopeTable) -> Functions:
    """Peers of ``rope``, in float32 with halves as pairs."""

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * table.cos - b * table.sin, b * table.cos + a * table.sin), -1).to(x.dtype)

    return with_compiled(rotate)


def cross_entropy(targets: Tensor) -> Functions:
    """Peers of ``cross_entropy``, the sum over all targets. Liger's overwrites the logits with their gradient."""
    functions = with_compiled(lambda x: F.cross_entropy(x.float(), targets, reduction="sum"))
    if liger_functions := liger():
        functions[LIGER] = lambda x: liger_functions.liger_cross_entropy(x, targets, reduction="sum")
    return functions


def linear_cross_entropy(targets: Tensor) -> Functions:
    """Peers of ``linear_cross_entropy``: materialised logits, upcast to float32; and Liger's chunks."""
    functions = with_compiled(lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum"))
    if liger_functions := liger():
        functions[LIGER] = lambda h, w: liger_functions.liger_fused_linear_cross_entropy(h, w, targets, reduction="sum")
    return functions
