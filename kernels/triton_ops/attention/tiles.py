"""What the attention kernels share: which tile a program works on, what its rows may see, and rotary embedding of a tile.

Every mask but the additive one is an interval: causality, a window and a document let a row see the places [start, stop) of
the other side, and nothing else. So the tiles of the other side that a block of rows must visit are an interval too, and the
part of it that *every* row sees whole takes no mask. Ids that do not come in runs have holes in their intervals; such a row
declares nothing whole, and its tiles compare ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    x,
    row,
    head,
    first,
    inside,
    x_b,
    x_t,
    x_h,
    cols,
    kept,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOXES: tl.constexpr,
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
