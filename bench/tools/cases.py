"""Benchmark cases: every op at the shapes of the goals, with its inputs, its peers and its work.

All functions of a case take the same inputs. Work is the minimum that the op needs, not what an implementation does:
keys that a token cannot see count nothing, and each input and output crosses memory once. A GPU gets the full shapes, a
CPU small ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from bench.tools import peers

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
OURS = "trireme"
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """One op at one shape, with the functions to compare."""

    op: str
    shape: str
    leaves: tuple[Tensor, ...]
    """The inputs, which all require gradients; the functions take nothing else."""
    functions: dict[str, Function]
    unit: str
    """Unit of ``work``: FLOP, or B for bytes."""
    work: dict[str, float]
    """Amount of work by mode; other modes are not measured."""


def work_by_mode(forward: float, backward: float) -> dict[str, float]:
    """Work of the three modes from that of forward and backward pass."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


@dataclass(frozen=True)
class Size:
    """Size of the cases: for which device, and whether only the first shape of each op (``quick``)."""

    device: torch.device
    quick: bool

    @property
    def gpu(self) -> bool:
        """Whether cases run on a GPU, at the shapes of the goals."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all inputs: bfloat16 on a GPU, else float32."""
        return torch.bfloat16 if self.gpu else torch.float32

    def random_input(self, *shape: int) -> Tensor:
        """Normally distributed input that requires its gradient."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype).requires_grad_()

    def select_shapes(self, on_gpu: list, on_cpu: list) -> list:
        """The shapes for this device; only the first with ``quick``."""
        shapes = on_gpu if self.gpu else on_cpu
        return shapes[:1] if self.quick else shapes


def attention(size: Size) -> Iterator[Case]:
    """Causal attention over 16k tokens with 2048 features, as in FlashAttention's papers; and grouped heads."""
    on_gpu = [(4096, 16, 16, 128), *((t, 16, 16, 128) for t in (2048, 8192, 16384))]
    on_gpu += [*((t, 32, 32, 64) for t in (2048, 4096, 8192, 16384)), (2048, 32, 8, 64)]
    for length, heads, kv_heads, width in size.select_shapes(on_gpu, [(256, 4, 4, 64)]):
        rows = (16384 if size.gpu else 512) // length
        q, k, v = (size.random_input(rows, length, h, width) for h in (heads, kv_heads, kv_heads))
        flops = 4 * rows * heads * width * length * (length + 1) / 2
        functions = {OURS: lambda q, k, v: kernels.attention(q, k, v, causal=True), **peers.attention(size.gpu, length)}
        shape = f"{rows} x {length}, {heads}/{kv_heads} heads of {width}"
        yield Case("attention", shape, (q, k, v), functions, "FLOP", work_by_mode(flops, 2.5 * flops))


def packed_attention(size: Size) -> Iterator[Case]:
    """Documents of 512 tokens on average, packed into rows of 8k; no token sees another document."""
    for length, mean, heads, width in size.select_shapes(
        [(8192, 512, 16, 128), (8192, 512, 32, 64)], [(256, 32, 4, 64)]
    ):
        ids, lengths = documents(2, length, mean)
        ids = ids.to(size.device)
        q, k, v = (size.random_input(2, length, heads, width) for _ in range(3))
        flops = 4 * heads * width * sum(n * (n + 1) / 2 for n in lengths)
        segments = kernels.Segments(ids, ids)
        trireme_functions = {OURS: lambda q, k, v, s=segments: kernels.attention(q, k, v, causal=True, segments=s)}
        shape = f"2 x {length} of {mean}, {heads} heads of {width}"
        functions = trireme_functions | peers.packed_attention(ids)
        yield Case("packed_attention", shape, (q, k, v), functions, "FLOP", work_by_mode(flops, 2.5 * flops))


def documents(rows: int, length: int, mean: int) -> tuple[Tensor, list[int]]:
    """Segment ids (rows, length) of documents with exponentially distributed lengths, and those lengths."""
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.empty(rows, length, dtype=torch.int32), []
    for row in ids:
        start = number = 0
        while start < length:
            drawn_length = torch.empty(()).exponential_(1 / mean, generator=generator)
            end = min(length, start + max(1, round(float(drawn_length))))
            number += 1
            row[start:end] = number
            lengths.append(end - start)
            start = end
    return ids, lengths


def norms(size: Size) -> Iterator[Case]:
    """Each norm, alone and after a residual add."""
    on_gpu = [(16384, 4096), (256, 768), (8192, 8192), (4096, 16384)]
    for rows, width in size.select_shapes(on_gpu, [(512, 768)]):
        x, residual, weight, bias = (
            size.random_input(*shape) for shape in ((rows, width), (rows, width), (width,), (width,))
        )
        tensor = x.numel() * x.element_size()
        trireme_functions: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
            "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5), (x, weight)),
            "layer_norm": (lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5), (x, weight, bias)),
            "add_rms_norm": (lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5), (x, residual, weight)),
            "add_layer_norm": (
                lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b, 1e-5),
                (x, residual, weight, bias),
            ),
        }
        for op, (function, leaves) in trireme_functions.items():
            forward, backward = (4, 4) if op.startswith("add") else (2, 3)
            functions = {OURS: function, **peers.norm(op)}
            yield Case(
                op, f"{rows} x {width}", leaves, functions, "B", work_by_mode(forward * tensor, backward * tensor)
            )


def activations(size: Size) -> Iterator[Case]:
    """The pointwise ops: activations of an MLP, and rotary embedding."""
    for rows, width in size.select_shapes([(16384, 8192)], [(512, 3072)]):
        gate, up, bias = (size.random_input(*shape) for shape in ((rows, width), (rows, width), (width,)))
        tensor = gate.numel() * gate.element_size()
        functions = {OURS: kernels.gated_mlp, **peers.activation("gated_mlp")}
        yield Case("gated_mlp", f"{rows} x {width}", (gate, up), functions, "B", work_by_mode(3 * tensor, 5 * tensor))
        functions = {OURS: kernels.bias_gelu, **peers.activation("bias_gelu")}
        yield Case("bias_gelu", f"{rows} x {width}", (up, bias), functions, "B", work_by_mode(2 * tensor, 3 * tensor))
    for rows, length, heads, width in size.select_shapes([(8, 2048, 32, 64)], [(2, 256, 8, 64)]):
        x = size.random_input(rows, length, heads, width)
        table = kernels.rope_table(torch.arange(length, device=size.device).expand(rows, -1), width, 1e4)
        functions = {OURS: lambda x, t=table: kernels.rope(x, t), **peers.rope(table)}
        moved = 2 * x.numel() * x.element_size() + 2 * table.cos.numel() * 4
        yield Case("rope", f"{rows} x {length} x {heads} x {width}", (x,), functions, "B", work_by_mode(moved, moved))


def losses(size: Size) -> Iterator[Case]:
    """Cross-entropy of logits in memory, and of a linear layer without its logits."""
    for tokens, vocab in size.select_shapes([(8192, 128256), (8192, 50304)], [(256, 8192)]):
        logits, targets = size.random_input(tokens, vocab), torch.randint(0, vocab, (tokens,), device=size.device)
        tensor = logits.numel() * logits.element_size()
        functions = {OURS: lambda x, t=targets: kernels.cross_entropy(x, t), **peers.cross_entropy(targets)}
        yield Case("cross_entropy", f"{tokens} x {vocab}", (logits,), functions, "B", work_by_mode(tensor, 2 * tensor))
    for tokens, width, vocab in size.select_shapes([(8192, 4096, 128256), (16384, 2048, 128256)], [(2048, 128, 4096)]):
        hidden, weight = size.random_input(tokens, width), size.random_input(vocab, width)
        targets = torch.randint(0, vocab, (tokens,), device=size.device)
        flops = 2 * tokens * width * vocab
        trireme_functions = {OURS: lambda h, w, t=targets: kernels.linear_cross_entropy(h, w, t)}
        functions = trireme_functions | peers.linear_cross_entropy(targets)
        # Gradients are computed in the forward pass, so there is no backward pass to measure alone.
        both = {FORWARD: flops, BOTH: 3 * flops}
        yield Case("linear_cross_entropy", f"{tokens} x {width} x {vocab}", (hidden, weight), functions, "FLOP", both)


FAMILIES: dict[str, tuple[Callable[[Size], Iterator[Case]], tuple[str, ...]]] = {
    "attention": (attention, ("attention",)),
    "packed_attention": (packed_attention, ("packed_attention",)),
    "losses": (losses, ("cross_entropy", "linear_cross_entropy")),
    "norms": (norms, ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")),
    "activations": (activations, ("gated_mlp", "bias_gelu", "rope")),
}
"""Families of ops by name: the generator of their cases, and the names of their ops."""
OPS = list(itertools.chain.from_iterable(ops for _, ops in FAMILIES.values()))
