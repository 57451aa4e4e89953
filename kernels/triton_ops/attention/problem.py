"""What the host side of the attention kernels shares: the problem that they are told, and with which tiles they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels.tuning as tuning

FAR = 1 << 30
"""A distance that no row is long enough to reach."""

Choice = tuple[int, int, int, int, int]
"""BLOCK_M, BLOCK_N, BOXES, num_warps, num_stages."""


class Problem(NamedTuple):
    """What every kernel of attention is told, in the order of their arguments; dense along the last dimension of q, k and v."""

    q: Tensor  # (B, Tq, H, Dh)
    k: Tensor  # (B, Tk, Hkv, Dh)
    v: Tensor
    bias: Tensor | None  # (B or 1, H or 1, Tq, Tk)
    q_marks: Tensor | None  # (B, 4, Tq) int32, of Segments.marks
    k_marks: Tensor | None  # (B, 4, Tk)
    cos: Tensor | None  # (B or 1, T, 1, Dh/2) float32, dense
    sin: Tensor | None
    before: int  # places back and ahead that a query sees
    after: int
    scale: float

    @property
    def groups(self) -> int:
        """Query heads to a key head."""
        return self.q.shape[2] // self.k.shape[2]

    def strides(self, *more: Tensor) -> list[int]:
        """Of q, k, v and ``more``, then of the bias and the rotary table: 0 where these are broadcast."""
        bias = (
            [0] * 4
            if self.bias is None
            else [s * (n > 1) for n, s in zip(self.bias.shape, self.bias.stride(), strict=True)]
        )
        table = 0 if self.cos is None or self.cos.shape[0] == 1 else self.cos.stride(0)
        return [*(s for x in (self.q, self.k, self.v, *more) for s in x.stride()[:3]), *bias, table]

    def constants(self) -> dict[str, object]:
        """What kernels are compiled for. float32 is multiplied as ``torch.set_float32_matmul_precision`` says, the highest
        being three products in TF32, which lose no more than float32's own rounding."""
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        precision = precision if self.q.dtype == torch.float32 else "ieee"
        head_dim = self.q.shape[3]
        dims = {"GROUPS": self.groups, "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
        return {**dims, "SCALE": self.scale, "PRECISION": precision}

    def shape_class(self) -> tuple[object, ...]:
        """What the best tiles depend on, coarsely, so that few classes are ever measured."""
        kind = "packed" if self.q_marks is not None else "causal" if self.after == 0 else "full"
        extra = "bias" if self.bias is not None else "rope" if self.cos is not None else "plain"
        lengths = (triton.next_power_of_2(x.shape[1]) for x in (self.q, self.k))
        return str(self.q.dtype).removeprefix("torch."), padded(self.q.shape[3]), kind, extra, *lengths


def dense(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension is dense in memory, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def side_by_side(x: Tensor) -> int:
    """How many heads of x (B, T, Hkv, Dh) programs work on at the same time: their keys and values fill half of 50 MB of L2."""
    return max(1, (24 << 20) // (2 * x.shape[1] * x.shape[3] * x.element_size()))


def boxed(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of ``rows`` rows of x (B, T, H, Dh) for Hopper's copy engine, which fills with 0 what lies outside of x."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded(x.shape[3])])


def padded(head_dim: int) -> int:
    """Width of a tile: a power of two, at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(head_dim))


def rounded(head_dim: int) -> int:
    """The width of head that tiles are chosen by."""
    return max(64, padded(head_dim))


def run_best(
    op: str, problem: Problem, read: Sequence[Tensor], choices: Sequence[Choice], run: Callable[[tuning.Tiles], None]
) -> None:
    """Runs a kernel with the best of ``choices``: the first where nothing was measured.

    Those with BOXES are left out where Hopper's copy engine cannot fetch what the kernel's loop ``read``s: it wants
    addresses and strides in multiples of 16 bytes, and a head's elements in the order in which they lie.
    """
    hopper = not read[0].is_cuda or torch.cuda.get_device_capability(read[0].device) >= (9, 0)
    ordered = problem.cos is None or problem.q.shape[3] == padded(problem.q.shape[3])
    aligned = all(
        x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3]) for x in read
    )
    boxes = hopper and ordered and aligned
    names = "BLOCK_M", "BLOCK_N", "BOXES", "num_warps", "num_stages"
    candidates = [dict(zip(names, choice, strict=True)) for choice in choices if boxes or not choice[2]]
    run(tuning.best(op, (*problem.shape_class(), "boxes" if boxes else "pointers"), candidates, run))
