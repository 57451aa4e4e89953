"""Device functions of the attention kernels: tile order, visible ranges, loads, rotary embedding.

Every mask but the additive bias is an interval: causality, a window and a document each let a row see the positions
[start, stop) of the other side. So the tiles that a block of rows must visit form an interval too. Tiles that *every*
row of the block sees in full ("full" tiles) need no mask; those at the borders ("partial" tiles) do. If the ids of a
document are not contiguous, its interval has holes: such a row claims no full tile, and its tiles compare ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of_program(program, n_blocks, n_batch_heads, concurrent_heads):
    """(block, batch_head) of a program: ``concurrent_heads`` pairs of batch and head advance block by block together.

    The keys and values of these pairs fit the L2 cache together, and heads of a group are neighbours. The first block
    of every pair (which the caller makes the longest) starts before the second of any, so the programs that end last
    are short.
    """
    first = program // (concurrent_heads * n_blocks) * concurrent_heads
    width = tl.minimum(concurrent_heads, n_batch_heads - first)
    index = program - first * n_blocks
    return index // width, first + index % width


@triton.jit
def visible_range(
    rows,
    shift,
    window_left,
    window_right,
    low,
    high,
    bounds_ptr,  # (4, length) int32 or None: Segments.bounds of one batch row
    length,
):
    """(start, stop, full_stop) of the positions in [low, high) of the other side that each row sees.

    Row r is aligned with position r + shift of the other side and sees ``window_left`` positions back and
    ``window_right`` ahead. All positions in [start, full_stop) are visible; full_stop is 0 where the interval of a
    document has holes.
    """
    start = tl.maximum(rows + shift - window_left, low)
    stop = tl.minimum(rows + shift + window_right + 1, high)
    full_stop = stop
    if bounds_ptr is not None:
        start = tl.maximum(start, tl.load(bounds_ptr + length + rows))
        stop = tl.minimum(stop, tl.load(bounds_ptr + 2 * length + rows))
        full_stop = tl.minimum(stop, tl.load(bounds_ptr + 3 * length + rows))
    return start, stop, full_stop


@triton.jit
def tile_ranges(start, stop, full_stop, BLOCK: tl.constexpr):
    """(first, full_first, n_full, n_partial): the tiles of the other side that a block of rows visits.

    ``n_full`` tiles from position ``full_first`` on are visible to every row; ``n_partial`` more, from position
    ``first`` on and
    skipping the full ones, need a mask.
    """
    first = tl.min(start) // BLOCK * BLOCK
    full_first = (tl.max(start) + BLOCK - 1) // BLOCK * BLOCK
    n_full = tl.maximum(tl.min(full_stop) // BLOCK - full_first // BLOCK, 0)
    n_partial = tl.maximum((tl.max(stop) - first + BLOCK - 1) // BLOCK - n_full, 0)
    return first, full_first, n_full, n_partial


@triton.jit
def tile_start(index, PARTIAL: tl.constexpr, first, full_first, n_full, BLOCK: tl.constexpr):
    """First position of a tile: the ``index``-th of the partial tiles, or of the full ones."""
    if PARTIAL:
        start = first + index * BLOCK
        return start + tl.where(start >= full_first, n_full * BLOCK, 0)
    else:  # noqa: RET505  the compiler would go on after the return
        return full_first + index * BLOCK


@triton.jit
def head_columns(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """(columns, mask) of a tile BLOCK_D wide; with ``HALVES`` each half of the head fills its own half of the tile."""
    column = tl.arange(0, BLOCK_D)
    if HALVES and HEAD_DIM != BLOCK_D:
        half: tl.constexpr = BLOCK_D // 2
        return column // half * (HEAD_DIM // 2) + column % half, column % half < HEAD_DIM // 2
    else:  # noqa: RET505  the compiler would go on after the return
        return column, column < HEAD_DIM


@triton.jit
def load_tile(
    base_ptr,  # (T, Dh) of one head
    offsets,
    column_mask,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loads a tile (rows, BLOCK_D), with 0 in the columns beyond the head dimension."""
    if HEAD_DIM == BLOCK_D:
        return tl.load(base_ptr + offsets)
    else:  # noqa: RET505  the compiler would go on after the return
        return tl.load(base_ptr + offsets, mask=column_mask[None, :], other=0.0)


@triton.jit
def load_rows(
    x_ptr,  # (B, T, H, Dh); a tensor descriptor with USE_TMA
    batch,
    head,
    first,
    offsets,
    x_batch_stride,
    x_row_stride,
    x_head_stride,
    columns,
    column_mask,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Loads the tile of x whose rows are the positions ``first + offsets`` of one head."""
    if USE_TMA:
        tile = x_ptr.load([batch.to(tl.int32), first.to(tl.int32), head.to(tl.int32), 0])
        return tl.reshape(tile, (offsets.shape[0], BLOCK_D))
    else:  # noqa: RET505  the compiler would go on after the return
        base_ptr = x_ptr + batch * x_batch_stride + head * x_head_stride + first.to(tl.int64) * x_row_stride
        return load_tile(base_ptr, offsets[:, None] * x_row_stride + columns[None, :], column_mask, HEAD_DIM, BLOCK_D)


@triton.jit
def rotate(
    a,
    b,
    cos_ptr,  # (T, Dh/2)
    sin_ptr,  # (T, Dh/2)
    rows,
    sign,
    HEAD_DIM: tl.constexpr,
):
    """Rotary embedding of the two halves of a tile; the inverse rotation with ``sign`` -1."""
    column = tl.arange(0, a.shape[1])
    offsets, mask = rows[:, None] * (HEAD_DIM // 2) + column[None, :], (column < HEAD_DIM // 2)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0) * sign
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def join_halves(a, b):
    """Concatenates two tiles (M, D/2) along the columns -> (M, D)."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def load_halves(
    base_ptr,  # (T, Dh) of one head
    offsets,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loads the two halves, (M, BLOCK_D/2) each, of the rows that start at ``offsets`` (M, 1)."""
    column = tl.arange(0, BLOCK_D // 2)
    mask = (column < HEAD_DIM // 2)[None, :]
    a = tl.load(base_ptr + offsets + column[None, :], mask=mask, other=0.0)
    return a, tl.load(base_ptr + offsets + column[None, :] + HEAD_DIM // 2, mask=mask, other=0.0)


@triton.jit
def load_rotated(
    base_ptr,  # (T, Dh) of one head
    offsets,
    cos_ptr,  # (T, Dh/2)
    sin_ptr,  # (T, Dh/2)
    rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loads a tile (M, BLOCK_D) and applies rotary embedding, in the dtype of the tile."""
    a, b = load_halves(base_ptr, offsets, HEAD_DIM, BLOCK_D)
    rotated_a, rotated_b = rotate(a, b, cos_ptr, sin_ptr, rows, 1.0, HEAD_DIM)
    return join_halves(rotated_a.to(a.dtype), rotated_b.to(b.dtype))


@triton.jit
def rotate_back(
    x,
    cos_ptr,  # (T, Dh/2)
    sin_ptr,  # (T, Dh/2)
    rows,
    HEAD_DIM: tl.constexpr,
):
    """Gradient (M, D) by a tile before rotary embedding, from the gradient ``x`` by the rotated tile."""
    a, b = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    a, b = rotate(a, b, cos_ptr, sin_ptr, rows, -1.0, HEAD_DIM)
    return join_halves(a, b)
