"""What is measured: every op at the shapes of the goals, with its inputs, its peers and the work that it has to do.

A case's functions take the same inputs. Work is counted as it must be done, not as it is: keys that a token cannot see are no
work, and each input and output crosses memory once. A GPU gets the full shapes, a CPU small ones.
"""

from __future__ import annotations

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
    """One op at one shape."""

    op: str
    shape: str
    leaves: tuple[Tensor, ...]
    """The inputs that want gradients; functions take these alone."""
    functions: dict[str, Function]
    unit: str
    """FLOP or B(ytes)."""
    work: dict[str, float]
    """By mode; a mode that is not here is not measured."""


def work(forward: float, backward: float) -> dict[str, float]:
    """Of every mode."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


@dataclass(frozen=True)
class Size:
    """How large cases are made: for which device, and whether only a few of them."""

    device: torch.device
    quick: bool

    @property
    def gpu(self) -> bool:
        """Whether shapes are those of the goals."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of all inputs."""
        return torch.bfloat16 if self.gpu else torch.float32

    def some(self, *shape: int) -> Tensor:
        """Random numbers that want their gradient."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype).requires_grad_()

    def choose(self, on_gpu: list, on_cpu: list) -> list:
        """The shapes for this device; the first only, where few are wanted."""
        shapes = on_gpu if self.gpu else on_cpu
        return shapes[:1] if self.quick else shapes


def attention(size: Size) -> Iterator[Case]:
    """Causal, 16k tokens in all and 2048 features, as FlashAttention's papers measure it; and grouped heads."""
    on_gpu = [(4096, 16, 16, 128), *((t, 16, 16, 128) for t in (2048, 8192, 16384))]
    on_gpu += [*((t, 32, 32, 64) for t in (2048, 4096, 8192, 16384)), (2048, 32, 8, 64)]
    for length, heads, kv_heads, width in size.choose(on_gpu, [(256, 4, 4, 64)]):
        rows = (16384 if size.gpu else 512) // length
        q, k, v = (size.some(rows, length, h, width) for h in (heads, kv_heads, kv_heads))
        flops = 4 * rows * heads * width * length * (length + 1) / 2
        functions = {OURS: lambda q, k, v: kernels.attention(q, k, v, causal=True), **peers.attention(size.gpu, length)}
        shape = f"{rows} x {length}, {heads}/{kv_heads} heads of {width}"
        yield Case("attention", shape, (q, k, v), functions, "FLOP", work(flops, 2.5 * flops))


def packed_attention(size: Size) -> Iterator[Case]:
    """Documents of 512 tokens in the mean, packed into rows of 8k; no token sees another's document."""
    for length, mean, heads, width in size.choose([(8192, 512, 16, 128), (8192, 512, 32, 64)], [(256, 32, 4, 64)]):
        ids, lengths = documents(2, length, mean)
        ids = ids.to(size.device)
        q, k, v = (size.some(2, length, heads, width) for _ in range(3))
        flops = 4 * heads * width * sum(n * (n + 1) / 2 for n in lengths)
        segments = kernels.Segments(ids, ids)
        ours = {OURS: lambda q, k, v, s=segments: kernels.attention(q, k, v, causal=True, segments=s)}
        shape = f"2 x {length} of {mean}, {heads} heads of {width}"
        functions = ours | peers.packed_attention(ids)
        yield Case("packed_attention", shape, (q, k, v), functions, "FLOP", work(flops, 2.5 * flops))


def documents(rows: int, length: int, mean: int) -> tuple[Tensor, list[int]]:
    """Segment ids (rows, length) of documents of exponentially spread lengths, and those lengths."""
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.empty(rows, length, dtype=torch.int32), []
    for row in ids:
        start = number = 0
        while start < length:
            drawn = torch.empty(()).exponential_(1 / mean, generator=generator)
            end = min(length, start + max(1, round(float(drawn))))
            number += 1
            row[start:end] = number
            lengths.append(end - start)
            start = end
    return ids, lengths


def norms(size: Size) -> Iterator[Case]:
    """Each norm alone and with the residual add before it."""
    on_gpu = [(16384, 4096), (256, 768), (8192, 8192), (4096, 16384)]
    for rows, width in size.choose(on_gpu, [(512, 768)]):
        x, residual, weight, bias = (size.some(*shape) for shape in ((rows, width), (rows, width), (width,), (width,)))
        tensor = x.numel() * x.element_size()
        ours: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
            "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5), (x, weight)),
            "layer_norm": (lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5), (x, weight, bias)),
            "add_rms_norm": (lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5), (x, residual, weight)),
            "add_layer_norm": (
                lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b, 1e-5),
                (x, residual, weight, bias),
            ),
        }
        for op, (function, leaves) in ours.items():
            tensors = work(4 * tensor, 4 * tensor) if op.startswith("add") else work(2 * tensor, 3 * tensor)
            functions = {OURS: function, **peers.norm(op)}
            yield Case(op, f"{rows} x {width}", leaves, functions, "B", tensors)


def activations(size: Size) -> Iterator[Case]:
    """The steps between the products of an MLP and before attention."""
    for rows, width in size.choose([(16384, 8192)], [(512, 3072)]):
        gate, up, bias = (size.some(*shape) for shape in ((rows, width), (rows, width), (width,)))
        tensor = gate.numel() * gate.element_size()
        functions = {OURS: kernels.gated_mlp, **peers.activation("gated_mlp")}
        yield Case("gated_mlp", f"{rows} x {width}", (gate, up), functions, "B", work(3 * tensor, 5 * tensor))
        functions = {OURS: kernels.bias_gelu, **peers.activation("bias_gelu")}
        yield Case("bias_gelu", f"{rows} x {width}", (up, bias), functions, "B", work(2 * tensor, 3 * tensor))
    for rows, length, heads, width in size.choose([(8, 2048, 32, 64)], [(2, 256, 8, 64)]):
        x = size.some(rows, length, heads, width)
        table = kernels.rope_table(torch.arange(length, device=size.device).expand(rows, -1), width, 1e4)
        functions = {OURS: lambda x, t=table: kernels.rope(x, t), **peers.rope(table)}
        moved = 2 * x.numel() * x.element_size() + 2 * table.cos.numel() * 4
        yield Case("rope", f"{rows} x {length} x {heads} x {width}", (x,), functions, "B", work(moved, moved))


def losses(size: Size) -> Iterator[Case]:
    """The loss of logits that exist, and of those that never do."""
    for tokens, vocab in size.choose([(8192, 128256), (8192, 50304)], [(256, 8192)]):
        logits, targets = size.some(tokens, vocab), torch.randint(0, vocab, (tokens,), device=size.device)
        tensor = logits.numel() * logits.element_size()
        functions = {OURS: lambda x, t=targets: kernels.cross_entropy(x, t), **peers.cross_entropy(targets)}
        yield Case("cross_entropy", f"{tokens} x {vocab}", (logits,), functions, "B", work(tensor, 2 * tensor))
    for tokens, width, vocab in size.choose([(8192, 4096, 128256), (16384, 2048, 128256)], [(2048, 128, 4096)]):
        hidden, weight = size.some(tokens, width), size.some(vocab, width)
        targets = torch.randint(0, vocab, (tokens,), device=size.device)
        flops = 2 * tokens * width * vocab
        ours = {OURS: lambda h, w, t=targets: kernels.linear_cross_entropy(h, w, t)}
        functions = ours | peers.linear_cross_entropy(targets)
        # Its gradients are made in the forward pass: there is no backward pass to be measured alone.
        both = {FORWARD: flops, BOTH: 3 * flops}
        yield Case("linear_cross_entropy", f"{tokens} x {width} x {vocab}", (hidden, weight), functions, "FLOP", both)


FAMILIES: dict[str, tuple[Callable[[Size], Iterator[Case]], tuple[str, ...]]] = {
    "attention": (attention, ("attention",)),
    "packed_attention": (packed_attention, ("packed_attention",)),
    "losses": (losses, ("cross_entropy", "linear_cross_entropy")),
    "norms": (norms, ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")),
    "activations": (activations, ("gated_mlp", "bias_gelu", "rope")),
}
"""By name: what makes their cases, and their ops."""
OPS = [op for _, ops in FAMILIES.values() for op in ops]
