"""The arguments that all attention kernels share, and the choice of their tile sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels.tuning as tuning
from kernels.requirements import TMA_CAPABILITY, DeviceLimits, limits_of

UNBOUNDED = 1 << 30
"""Window size that no sequence is long enough to reach."""


class TileChoice(NamedTuple):
    """A candidate, and the KiB of shared memory that its kernel takes by the instruction of its matrix products.

    None where the candidate is not for GPUs of that instruction: it spills in its loop, or takes too much tensor
    memory. A bias is not counted (``fits``). tests/kernels/test_compile.py compares with the compiled code.
    """

    block_m: int
    block_n: int
    use_tma: int
    num_warps: int
    num_stages: int
    mma: int | None
    wgmma: int | None
    tcgen05: int | None
    warp_specialize: bool = False
    """Loads, products and softmax in warps of their own: the forward pass alone, where Triton can compile it."""

    def tiles(self) -> tuning.Tiles:
        """The constexprs and launch options of the kernel."""
        names = "BLOCK_M", "BLOCK_N", "USE_TMA", "num_warps", "num_stages"
        specialized = {"WARP_SPECIALIZE": 1} if self.warp_specialize else {}
        return dict(zip(names, self[:5], strict=True)) | specialized

    def fits(self, limits: DeviceLimits | None, bias_bytes: int) -> bool:
        """Whether a GPU of these limits can run the kernel; a bias has ``bias_bytes`` an element, 0 without one.

        The copy pipeline holds num_stages tiles of a bias at most.
        """
        if limits is None:
            return True
        kib: int | None = getattr(self, limits.products)
        bias_tiles = self.num_stages * self.block_m * self.block_n * bias_bytes
        has_tma = limits.capability >= TMA_CAPABILITY
        return kib is not None and (has_tma or not self.use_tma) and (kib << 10) + bias_tiles <= limits.shared_bytes


TileRows = dict[int, list[tuple[int, int, int, int, int, int | None, int | None, int | None]]]
"""Head dimension -> its candidates, each the fields of a TileChoice."""


class AttentionProblem(NamedTuple):
    """The arguments of every attention kernel, in their order; q, k and v have stride 1 in the last dimension."""

    q: Tensor  # (B, Tq, H, Dh)
    k: Tensor  # (B, Tk, Hkv, Dh)
    v: Tensor  # (B, Tk, Hkv, Dh)
    bias: Tensor | None  # (B or 1, H or 1, Tq, Tk)
    q_bounds: Tensor | None  # (B, 4, Tq) int32, of Segments.bounds
    k_bounds: Tensor | None  # (B, 4, Tk) int32
    cos: Tensor | None  # (B or 1, T, 1, Dh/2) float32, contiguous
    sin: Tensor | None  # (B or 1, T, 1, Dh/2) float32, contiguous
    window_left: int  # positions back that a query sees
    window_right: int  # positions ahead that a query sees
    scale: float

    @property
    def groups(self) -> int:
        """Query heads per key head: 1 for multi-head attention, H for multi-query."""
        return self.q.shape[2] // self.k.shape[2]

    def strides(self, *more: Tensor) -> list[int]:
        """Strides of q, k, v and ``more``, then of the bias and the rotary table: 0 where these are broadcast."""
        tensor_strides: list[int] = []
        for x in (self.q, self.k, self.v, *more):
            tensor_strides += x.stride()[:3]
        bias_strides = [0] * 4
        if self.bias is not None:
            sizes = zip(self.bias.shape, self.bias.stride(), strict=True)
            bias_strides = [stride * (size > 1) for size, stride in sizes]
        cos_batch_stride = 0 if self.cos is None or self.cos.shape[0] == 1 else self.cos.stride(0)
        return [*tensor_strides, *bias_strides, cos_batch_stride]

    def constexprs(self) -> dict[str, object]:
        """Compile-time constants of the kernels.

        float32 products follow ``torch.set_float32_matmul_precision``: the highest is three products in TF32, which
        lose no more than float32's own rounding.
        """
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        precision = precision if self.q.dtype == torch.float32 else "ieee"
        head_dim = self.q.shape[3]
        dims = {"GROUPS": self.groups, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
        return {**dims, "SCALE": self.scale, "PRECISION": precision}

    def shape_class(self) -> tuple[object, ...]:
        """Key of the tuning table: what the best tiles depend on, coarse enough that few classes are ever measured."""
        kind = "packed" if self.q_bounds is not None else "causal" if self.window_right == 0 else "full"
        extra = "bias" if self.bias is not None else "rope" if self.cos is not None else "plain"
        lengths = (triton.next_power_of_2(x.shape[1]) for x in (self.q, self.k))
        return str(self.q.dtype).removeprefix("torch."), padded_head_dim(self.q.shape[3]), kind, extra, *lengths


def contiguous_rows(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def heads_in_l2(x: Tensor) -> int:
    """Heads of x (B, T, Hkv, Dh) to process concurrently: their keys and values fill half of a 50 MB L2 cache."""
    return max(1, (24 << 20) // (2 * x.shape[1] * x.shape[3] * x.element_size()))


def tma_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of tiles of ``rows`` rows of x (B, T, H, Dh) for Hopper's TMA, which reads 0 outside of x."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded_head_dim(x.shape[3])])


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile: a power of two, at least the 16 columns that a matrix product needs."""
    return max(16, triton.next_power_of_2(head_dim))


def head_dim_class(head_dim: int) -> int:
    """Head dimension by which tile sizes are chosen: 64, 128 or 256."""
    return max(64, padded_head_dim(head_dim))


def run_best_tiles(
    op: str,
    problem: AttentionProblem,
    loop_tensors: Sequence[Tensor],
    choices: Sequence[TileChoice],
    run: Callable[[tuning.Tiles], None],
) -> None:
    """Runs a kernel with the best of ``choices``: the first that fits the device where nothing was measured.

    Choices with USE_TMA are left out where TMA cannot read ``loop_tensors``, the tensors that the kernel's loop loads:
    it needs addresses and strides in multiples of 16 bytes, and the columns of a head in memory order. Raises
    ValueError where no choice fits, as for float64 and the widest heads on small GPUs.
    """
    limits = limits_of(loop_tensors[0].device)
    in_memory_order = problem.cos is None or problem.q.shape[3] == padded_head_dim(problem.q.shape[3])
    can_use_tma = in_memory_order and all(_is_aligned(x) for x in loop_tensors)
    bias_bytes = 0 if problem.bias is None else problem.bias.element_size()
    fitting = [c for c in choices if c.fits(limits, bias_bytes) and (can_use_tma or not c.use_tma)]
    if not fitting:
        q = problem.q
        raise ValueError(f"no tiles of {op} for heads {q.shape[3]} wide in {q.dtype} fit this GPU: use kernels=torch")
    key = *problem.shape_class(), "tma" if can_use_tma else "pointers"
    run(tuning.best_tiles(op, key, [c.tiles() for c in fitting], run))


def _is_aligned(x: Tensor) -> bool:
    """Whether the address and all strides of x but the last are positive multiples of 16 bytes."""
    strides_fit = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return x.data_ptr() % 16 == 0 and strides_fit
