"""Calls of every op that are compiled without a GPU (``compile_offline``), at the shapes of the model families.

Causal and full attention are the same code with other arguments, so one of them stands for both.
"""

from __future__ import annotations

from collections.abc import Callable

DTYPES = ("float32", "bfloat16")


def packed_attention(head_dim: int, dtype: str) -> str:
    """A layer of Llama: grouped heads, packed documents, rotary embedding."""
    rope = f"kernels.rope_table(torch.arange(4096)[None], {head_dim}, 1e4)"
    segments = "kernels.Segments(*[torch.ones(1, 4096)] * 2)"
    return f"ops.attention({_qkv(4096, 2, head_dim, dtype)}, causal=True, segments={segments}, rope={rope})"


def plain_attention(head_dim: int, dtype: str) -> str:
    """A layer of GPT-2 whose rows are not packed, or with other arguments one of BERT."""
    return f"ops.attention({_qkv(4096, 8, head_dim, dtype)}, causal=True)"


def biased_attention(head_dim: int, dtype: str) -> str:
    """A layer of T5: an additive bias that the rows of a batch share, with its gradient."""
    bias = f"rand(1, 8, 512, 512, dtype=torch.{dtype})"
    qkv = f"*[rand(2, 512, 8, {head_dim}, dtype=torch.{dtype})] * 3"
    return f"ops.attention({qkv}, causal=False, bias={bias}, scale=1.0)"


def decoding(head_dim: int, dtype: str) -> str:
    """One token at a time, over split keys; the gradient is never asked for, and is compiled with it."""
    return f"ops.attention({_qkv(1, 2, head_dim, dtype)}, causal=True)"


def _qkv(n_queries: int, kv_heads: int, head_dim: int, dtype: str) -> str:
    kv = f"rand(1, 4096, {kv_heads}, {head_dim}, dtype=torch.{dtype})"
    return f"rand(1, {n_queries}, 8, {head_dim}, dtype=torch.{dtype}), {kv}, {kv}"


def row_wise(dtype: str, widths: tuple[int, ...]) -> list[str]:
    """Norms, pointwise ops and losses over rows of ``widths``."""
    cases = []
    for width in widths:
        x, w = (f"rand({shape}, dtype=torch.{dtype})" for shape in (f"64, {width}", width))
        cases += [
            f"ops.rms_norm({x}, {w}, 1e-5)",
            f"ops.layer_norm({x}, {w}, {w}, 1e-5)",
            f"ops.add_rms_norm({x}, {x}, {w}, 1e-5, kernels.Dropout(0.1, 7))",
            f"ops.add_layer_norm({x}, {x}, {w}, {w}, 1e-5, kernels.Dropout(0.1, 7))",
            f"ops.bias_gelu({x}, {w})",
            f"ops.gated_mlp(*rand(64, {2 * width}, dtype=torch.{dtype}).chunk(2, -1), 'silu')",
            f"ops.dropout({x}, kernels.Dropout(0.1, 7))",
        ]
    logits, targets = f"rand(64, 50304, dtype=torch.{dtype})", "torch.zeros(64, dtype=torch.int64)"
    return [
        *cases,
        f"ops.rope(rand(2, 8, 32, 64, dtype=torch.{dtype}), kernels.rope_table(torch.arange(8)[None], 64, 1e4))",
        f"ops.cross_entropy({logits}, {targets}, label_smoothing=0.1, z_loss=1e-4)",
        f"ops.cross_entropy_with_grad({logits}, {targets}, -100, 0.0, 0.0, True)",
        f"ops.scale_({logits}, torch.zeros(())) or rand(1)",
    ]


def _attention(*of: tuple[Callable[[int, str], str], int, str]) -> list[str]:
    return [case(head_dim, dtype) for case, head_dim, dtype in of]


SOME = [
    *_attention(
        (packed_attention, 48, "float32"),
        (packed_attention, 64, "bfloat16"),
        (packed_attention, 128, "bfloat16"),
        (plain_attention, 128, "float32"),
        (biased_attention, 64, "float32"),
        (decoding, 128, "bfloat16"),
    ),
    *row_wise("float32", (768,)),
    *row_wise("bfloat16", (4096,)),
]
"""A case or two of every kernel."""

EVERY_ATTENTION = [
    case(head_dim, dtype)
    for case in (packed_attention, plain_attention, biased_attention, decoding)
    for head_dim in (48, 64, 128, 256)
    for dtype in DTYPES
]
EVERY_ROW_WISE = [*row_wise("float32", (768, 4096, 8192)), *row_wise("bfloat16", (768, 4096, 8192, 16384))]
