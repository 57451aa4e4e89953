"""What the attention kernels share: which tile a program works on, what its rows may see, and rotary embedding of a tile.

Every mask but the additive one is an interval: causality, a window and a document let a row see the places [start, stop) of
the other side, and nothing else. So the tiles of the other side that a block of rows must visit are an interval too, and the
part of it that *every* row sees whole takes no mask. Ids that do not come in runs have holes in their intervals; such a row
declares nothing whole, and its tiles compare ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels.tuning as tuning
from kernels.launch import launch

FAR = 1 << 30
"""A distance that no row is long enough to reach."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(program, blocks, pairs, beside):
    """(block, pair) of a program: ``beside`` pairs of row and head advance block by block at the same time.

    Their keys and values fit the L2 cache together, heads of a group are neighbours, and every pair's first block (by the
    caller the longest) is started before any pair's second, so that the last programs to end are short.
    """
    first = program // (beside * blocks) * beside
    width = tl.minimum(beside, pairs - first)
    at = program - first * blocks
    return at // width, first + at % width


@triton.jit
def sees(rows, shift, before, after, low, high, marks, length):
    """(start, stop, whole_stop) of the places in [low, high) of the other side that each row sees.

    Row r stands at place r + shift there and sees ``before`` places back and ``after`` ahead. ``marks`` (4, length) is what
    ``Segments.marks`` says of a row of the batch: id, start, stop, and stop again or 0 where the interval has holes.
    """
    start = tl.maximum(rows + shift - before, low)
    stop = tl.minimum(rows + shift + after + 1, high)
    whole_stop = stop
    if marks is not None:
        start = tl.maximum(start, tl.load(marks + length + rows))
        stop = tl.minimum(stop, tl.load(marks + 2 * length + rows))
        whole_stop = tl.minimum(stop, tl.load(marks + 3 * length + rows))
    return start, stop, whole_stop


@triton.jit
def tiles(start, stop, whole_stop, BLOCK: tl.constexpr):
    """(begin, whole_begin, whole, edges): the tiles that a block of rows visits on the other side.

    ``whole`` tiles from place ``whole_begin`` on are seen whole by every row; ``edges`` more, from ``begin`` on and leaving
    those out, take a mask.
    """
    begin = tl.min(start) // BLOCK * BLOCK
    whole_begin = (tl.max(start) + BLOCK - 1) // BLOCK * BLOCK
    whole = tl.maximum(tl.min(whole_stop) // BLOCK - whole_begin // BLOCK, 0)
    edges = tl.maximum((tl.max(stop) - begin + BLOCK - 1) // BLOCK - whole, 0)
    return begin, whole_begin, whole, edges


@triton.jit
def tile_at(number, EDGE: tl.constexpr, begin, whole_begin, whole, BLOCK: tl.constexpr):
    """First place of a tile among the edges, or among the whole ones."""
    if EDGE:
        at = begin + number * BLOCK
        return at + tl.where(at >= whole_begin, whole * BLOCK, 0)
    else:  # noqa: RET505  the compiler would go on after the return
        return whole_begin + number * BLOCK


@triton.jit
def columns(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """(columns, kept) of a tile BLOCK_D wide; with ``HALVES`` each half of the head fills its own half of the tile."""
    at = tl.arange(0, BLOCK_D)
    if HALVES and HEAD_DIM != BLOCK_D:
        half: tl.constexpr = BLOCK_D // 2
        return at // half * (HEAD_DIM // 2) + at % half, at % half < HEAD_DIM // 2
    else:  # noqa: RET505  the compiler would go on after the return
        return at, at < HEAD_DIM


@triton.jit
def load_tile(base, offsets, kept, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (rows, BLOCK_D), 0 in the columns beyond the head's dimension."""
    if HEAD_DIM == BLOCK_D:
        return tl.load(base + offsets)
    else:  # noqa: RET505  the compiler would go on after the return
        return tl.load(base + offsets, mask=kept[None, :], other=0.0)


@triton.jit
def load_rows(
    x, row, head, first, inside, x_b, x_t, x_h, cols, kept, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOXES: tl.constexpr
):
    """The tile of x (B, T, H, Dh), a tensor descriptor if ``BOXES``, whose rows are ``inside`` beyond place ``first``."""
    if BOXES:
        tile = x.load([row.to(tl.int32), first.to(tl.int32), head.to(tl.int32), 0])
        return tl.reshape(tile, (inside.shape[0], BLOCK_D))
    else:  # noqa: RET505  the compiler would go on after the return
        base = x + row * x_b + head * x_h + first.to(tl.int64) * x_t
        return load_tile(base, inside[:, None] * x_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)


@triton.jit
def rotate(a, b, cos, sin, rows, sign, HEAD_DIM: tl.constexpr):
    """The two halves of a tile in rotary embedding, or with ``sign`` -1 turned back. cos, sin (T, Dh/2)."""
    at = tl.arange(0, a.shape[1])
    offsets, kept = rows[:, None] * (HEAD_DIM // 2) + at[None, :], (at < HEAD_DIM // 2)[None, :]
    c = tl.load(cos + offsets, mask=kept, other=0.0)
    s = tl.load(sin + offsets, mask=kept, other=0.0) * sign
    return a * c - b * s, b * c + a * s


@triton.jit
def join_halves(a, b):
    """(M, D/2) twice -> (M, D): a, then b."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def load_halves(base, offsets, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The two halves of the rows that start at ``offsets`` (M, 1)."""
    at = tl.arange(0, BLOCK_D // 2)
    kept = (at < HEAD_DIM // 2)[None, :]
    a = tl.load(base + offsets + at[None, :], mask=kept, other=0.0)
    return a, tl.load(base + offsets + at[None, :] + HEAD_DIM // 2, mask=kept, other=0.0)


@triton.jit
def load_turned(base, offsets, cos, sin, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile in rotary embedding, in its own format."""
    a, b = load_halves(base, offsets, HEAD_DIM, BLOCK_D)
    turned_a, turned_b = rotate(a, b, cos, sin, rows, 1.0, HEAD_DIM)
    return join_halves(turned_a.to(a.dtype), turned_b.to(b.dtype))


@triton.jit
def turn_back(x, cos, sin, rows, HEAD_DIM: tl.constexpr):
    """The gradient (M, D) of a tile from that of the tile in rotary embedding."""
    a, b = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    a, b = rotate(a, b, cos, sin, rows, -1.0, HEAD_DIM)
    return join_halves(a, b)


@triton.jit
def _turn_kernel(
    x,  # (B, T, H, Dh)
    cos,  # (B or 1, T, Dh/2)
    sin,
    out,  # (B, T, H, Dh), dense
    x_b,
    x_t,
    x_h,
    cos_b,
    length,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(at, length - 1)
    a, b = load_halves(x + row * x_b + head * x_h, rows.to(tl.int64)[:, None] * x_t, HEAD_DIM, BLOCK_D)
    a, b = rotate(a, b, cos + row * cos_b, sin + row * cos_b, rows, 1.0, HEAD_DIM)
    half = tl.arange(0, BLOCK_D // 2)
    places = out + ((row * length + at) * heads + head)[:, None] * HEAD_DIM + half[None, :]
    kept = (at < length)[:, None] & (half < HEAD_DIM // 2)[None, :]
    tl.store(places, a.to(out.dtype.element_ty), mask=kept)
    tl.store(places + HEAD_DIM // 2, b.to(out.dtype.element_ty), mask=kept)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A copy of x (B, T, H, Dh) in rotary embedding: for the side that a kernel's loop reads many times over."""
    rows, length, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = 64
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_M": size}
    grid, batch = (triton.cdiv(length, size), rows * heads), 0 if cos.shape[0] == 1 else cos.stride(0)
    launch(_turn_kernel, grid, x, cos, sin, out, *x.stride()[:3], batch, length, heads, **sizes, num_warps=4)
    return out


def padded(head_dim: int) -> int:
    """Width of a tile: a power of two, at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(head_dim))


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
        bias = [0] * 4 if self.bias is None else [s * (n > 1) for n, s in zip(self.bias.shape, self.bias.stride(), strict=True)]
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


def choices(problem: Problem, read: Sequence[Tensor], tiles: Sequence[tuple[int, int, int, int, int]]) -> list[tuning.Tiles]:
    """Tiles (BLOCK_M, BLOCK_N, BOXES, num_warps, num_stages) by name, without those whose boxes what the loop reads forbids.

    The copy engine wants addresses and strides in multiples of 16 bytes, and heads in the order they lie in.
    """
    ordered = problem.cos is None or problem.q.shape[3] == padded(problem.q.shape[3])
    steps = [s * x.element_size() for x in read for s in (*x.stride()[:3], x.storage_offset())]
    dense_enough = all(s % 16 == 0 for s in steps) and all(s > 0 for x in read for s in x.stride())
    hopper = not read[0].is_cuda or torch.cuda.get_device_capability(read[0].device) >= (9, 0)
    boxes = hopper and ordered and dense_enough
    names = "BLOCK_M", "BLOCK_N", "BOXES", "num_warps", "num_stages"
    return [dict(zip(names, t, strict=True)) for t in tiles if boxes or not t[2]]
