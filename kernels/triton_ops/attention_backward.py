"""The backward pass of attention: no score was kept, so each kernel makes its own again from the rows' saved log-sums.

With P the attention weights, delta = rowsum(dO * O) and dS = P * (dO V^T - delta):

    dQ = scale * dS K        a program owns a block of queries and walks over the keys it sees; it also makes delta
    dK = scale * dS^T Q      a program owns a block of keys of one key head and walks over the queries that see it,
    dV = P^T dO              of all query heads of its group

The gradient of a bias, dS itself, has a kernel of its own. (Dao et al. 2022, 2023). Every gradient is summed inside one program in a fixed order: two runs are equal bit for bit. The
price against atomic additions is that scores are made once more, 7 products for 5; what it buys besides is that no gradient
passes through memory in float32.

On Hopper: the two accumulators of dK and dV take half of the registers of 8 warps at 128 keys by 128 dimensions, so the
queries come 64 at a time; dQ has one accumulator and reads 64 keys at a time. Scores are made transposed for dK and dV, so
that P^T and dS^T are the left operands of wgmma straight from registers.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning
from kernels.triton_ops.attention_tiles import (
    LOG2_E,
    bias_strides,
    columns,
    constants,
    load_tile,
    place,
    rope_stride,
    sees,
    shape_class,
    tile_at,
    tiles,
    together,
    turn,
    turned,
    unit_stride,
)
from kernels.launch import dot, launch


@triton.jit
def _attention_backward_q_kernel(
    q,  # (B, Tq, H, Dh)
    k,  # (B, Tk, Hkv, Dh), turned
    v,  # (B, Tk, Hkv, Dh)
    bias,  # (B or 1, H or 1, Tq, Tk) or None
    q_marks,  # (B, 4, Tq) int32 or None
    k_marks,  # (B, 4, Tk) int32 or None
    cos,  # (B or 1, T, Dh/2) float32 or None
    sin,
    out,  # (B, Tq, H, Dh)
    lse,  # (B, H, Tq)
    grad_out,  # (B, Tq, H, Dh)
    q_turned,  # (B, Tq, H, Dh), written, or None
    delta,  # (B, H, Tq), written
    grad_q,  # (B, Tq, H, Dh), written
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    grad_b,
    grad_t,
    grad_h,
    bias_b,
    bias_h,
    bias_q,
    bias_k,
    cos_b,
    queries,
    keys,
    heads,
    pairs,  # B * H
    before,
    after,
    side_by_side,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = (queries + BLOCK_M - 1) // BLOCK_M
    block, pair = place(tl.program_id(0), blocks, pairs, side_by_side)
    block = blocks - 1 - block
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    at = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(at, queries - 1)
    if q_marks is not None:
        q_marks += row * 4 * queries
        k_marks += row * 4 * keys
        ids = tl.load(q_marks + rows)
    start, stop, whole_stop = sees(rows, keys - queries, before, after, 0, keys, q_marks, queries)
    begin, whole_begin, whole, edges = tiles(start, stop, whole_stop, BLOCK_N)

    plain, plain_kept = columns(HEAD_DIM, BLOCK_D, False)
    cols, kept = columns(HEAD_DIM, BLOCK_D, cos is not None)
    stored = ((row * queries + at) * heads + head)[:, None] * HEAD_DIM
    far = rows.to(tl.int64)[:, None]
    q_tile = load_tile(q + row * q_b + head * q_h, far * q_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
    if cos is not None:
        q_tile = turn(q_tile, cos + row * cos_b, sin + row * cos_b, rows, 1.0, HEAD_DIM)
        tl.store(q_turned + stored + cols[None, :], q_tile, mask=(at < queries)[:, None] & kept[None, :])
    grad_tile = load_tile(
        grad_out + row * grad_b + head * grad_h, far * grad_t + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D
    )
    place_out = ((row * queries + rows) * heads + head)[:, None] * HEAD_DIM
    out_tile = load_tile(out, place_out + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D)
    wide: tl.constexpr = lse.dtype.element_ty
    slope = tl.sum(out_tile.to(wide) * grad_tile.to(wide), 1)
    tl.store(delta + pair.to(tl.int64) * queries + at, slope, mask=at < queries)
    sums = tl.load(lse + pair.to(tl.int64) * queries + rows)
    k += row * k_b + head // GROUPS * k_h
    v += row * v_b + head // GROUPS * v_h

    unit: tl.constexpr = SCALE * LOG2_E if bias is None else 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_D), wide)
    for EDGE in tl.static_range(2):
        for number in tl.range(0, edges if EDGE else whole):
            first = tile_at(number, EDGE, begin, whole_begin, whole, BLOCK_N)
            inside = tl.arange(0, BLOCK_N)
            if EDGE:
                inside = tl.minimum(inside, keys - 1 - first)
            k_tile = load_tile(k + first.to(tl.int64) * k_t, inside[:, None] * k_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
            v_tile = load_tile(
                v + first.to(tl.int64) * v_t, inside[:, None] * v_t + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D
            )
            scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), wide), PRECISION)
            if bias is not None:
                offsets = far * bias_q + (first + inside).to(tl.int64)[None, :] * bias_k
                added = tl.load(bias + row * bias_b + head * bias_h + offsets).to(wide)
                scores = (scores * SCALE + added) * LOG2_E
            weights = tl.exp2(scores * unit - sums[:, None])
            if EDGE:
                places = first + tl.arange(0, BLOCK_N)
                seen = (places[None, :] >= start[:, None]) & (places[None, :] < stop[:, None])
                if q_marks is not None:
                    seen &= ids[:, None] == tl.load(k_marks + first + inside)[None, :]
                weights = tl.where(seen, weights, 0.0)
            grad_weights = dot(grad_tile, tl.trans(v_tile), tl.zeros((BLOCK_M, BLOCK_N), wide), PRECISION)
            grad_scores = weights * (grad_weights - slope[:, None])
            acc = dot(grad_scores.to(k_tile.dtype), k_tile, acc, PRECISION)

    acc *= SCALE
    if cos is not None:
        acc = turn(acc, cos + row * cos_b, sin + row * cos_b, rows, -1.0, HEAD_DIM)
    tl.store(grad_q + stored + cols[None, :], acc.to(grad_q.dtype.element_ty), mask=(at < queries)[:, None] & kept[None, :])


@triton.jit
def _attention_backward_kv_kernel(
    q,  # (B, Tq, H, Dh), turned
    k,  # (B, Tk, Hkv, Dh), turned
    v,  # (B, Tk, Hkv, Dh)
    bias,  # (B or 1, H or 1, Tq, Tk) or None
    q_marks,  # (B, 4, Tq) int32 or None
    k_marks,  # (B, 4, Tk) int32 or None
    cos,  # (B or 1, T, Dh/2) float32 or None
    sin,
    lse,  # (B, H, Tq)
    grad_out,  # (B, Tq, H, Dh)
    delta,  # (B, H, Tq)
    grad_k,  # (B, Tk, Hkv, Dh), written
    grad_v,  # (B, Tk, Hkv, Dh), written
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    grad_b,
    grad_t,
    grad_h,
    bias_b,
    bias_h,
    bias_q,
    bias_k,
    cos_b,
    queries,
    keys,
    heads,  # Hkv
    pairs,  # B * Hkv
    before,
    after,
    side_by_side,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = (keys + BLOCK_N - 1) // BLOCK_N
    block, pair = place(tl.program_id(0), blocks, pairs, side_by_side)  # causal: the first is seen by most
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(at, keys - 1)
    if q_marks is not None:
        q_marks += row * 4 * queries
        k_marks += row * 4 * keys
        ids = tl.load(k_marks + rows)
    # Which queries see these keys: the forward band, looked at from the other side.
    start, stop, whole_stop = sees(rows, queries - keys, after, before, 0, queries, k_marks, keys)
    begin, whole_begin, whole, edges = tiles(start, stop, whole_stop, BLOCK_M)

    plain, plain_kept = columns(HEAD_DIM, BLOCK_D, False)
    cols, kept = columns(HEAD_DIM, BLOCK_D, cos is not None)
    far = rows.to(tl.int64)[:, None]
    k_tile = load_tile(k + row * k_b + head * k_h, far * k_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
    v_tile = load_tile(v + row * v_b + head * v_h, far * v_t + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D)
    q += row * q_b + head * GROUPS * q_h
    grad_out += row * grad_b + head * GROUPS * grad_h
    statistics = (row * heads + head) * GROUPS * queries

    wide: tl.constexpr = lse.dtype.element_ty
    unit: tl.constexpr = SCALE * LOG2_E if bias is None else 1.0
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), wide)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), wide)
    for EDGE in tl.static_range(2):
        count = edges if EDGE else whole
        for step in tl.range(0, GROUPS * count):  # one loop over heads and tiles, so that the copies never run dry
            member = step // count
            first = tile_at(step - member * count, EDGE, begin, whole_begin, whole, BLOCK_M)
            inside = tl.arange(0, BLOCK_M)
            if EDGE:
                inside = tl.minimum(inside, queries - 1 - first)
            q_at = q + first.to(tl.int64) * q_t + member * q_h
            grad_at = grad_out + first.to(tl.int64) * grad_t + member * grad_h
            q_tile = load_tile(q_at, inside[:, None] * q_t + cols[None, :], kept, HEAD_DIM, BLOCK_D)
            grad_tile = load_tile(grad_at, inside[:, None] * grad_t + plain[None, :], plain_kept, HEAD_DIM, BLOCK_D)
            which = statistics + member * queries + first + inside
            scores = dot(k_tile, tl.trans(q_tile), tl.zeros((BLOCK_N, BLOCK_M), wide), PRECISION)
            if bias is not None:
                offsets = far * bias_k + (first + inside).to(tl.int64)[None, :] * bias_q
                added = tl.load(bias + row * bias_b + (head * GROUPS + member) * bias_h + offsets).to(wide)
                scores = (scores * SCALE + added) * LOG2_E
            weights = tl.exp2(scores * unit - tl.load(lse + which)[None, :])
            if EDGE:
                places = first + tl.arange(0, BLOCK_M)
                seen = (places[None, :] >= start[:, None]) & (places[None, :] < stop[:, None])
                if q_marks is not None:
                    seen &= ids[:, None] == tl.load(q_marks + first + inside)[None, :]
                weights = tl.where(seen, weights, 0.0)
            acc_v = dot(weights.to(grad_tile.dtype), grad_tile, acc_v, PRECISION)
            grad_weights = dot(v_tile, tl.trans(grad_tile), tl.zeros((BLOCK_N, BLOCK_M), wide), PRECISION)
            grad_scores = weights * (grad_weights - tl.load(delta + which)[None, :])
            acc_k = dot(grad_scores.to(q_tile.dtype), q_tile, acc_k, PRECISION)

    acc_k *= SCALE
    if cos is not None:
        acc_k = turn(acc_k, cos + row * cos_b, sin + row * cos_b, rows, -1.0, HEAD_DIM)
    stored = ((row * keys + at) * heads + head)[:, None] * HEAD_DIM
    inner = (at < keys)[:, None]
    tl.store(grad_k + stored + cols[None, :], acc_k.to(grad_k.dtype.element_ty), mask=inner & kept[None, :])
    tl.store(grad_v + stored + plain[None, :], acc_v.to(grad_v.dtype.element_ty), mask=inner & plain_kept[None, :])


@torch.library.custom_op("trireme::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_marks: Tensor | None,
    k_marks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    before: int,
    after: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, dense in the shapes of these, and delta (B, H, Tq)."""
    grad_out, q, k, v = (unit_stride(x) for x in (grad_out, q, k, v))
    grads = grad_q, grad_k, grad_v, delta = _grads(q, k, lse)
    if out.numel() == 0 or k.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    q_turned = None
    if cos is not None and sin is not None:
        k, q_turned = turned(k, cos, sin), torch.empty_like(grad_q)
    shared = bias, q_marks, k_marks, cos, sin
    options = before, after, scale
    dq = functools.partial(_run_dq, (q, k, v, *shared, out, lse, grad_out, q_turned, delta, grad_q), options)
    dq(tuning.best("attention_backward_q", shape_class(q, k, after, q_marks), _dq_candidates(q), dq))
    q = q if q_turned is None else q_turned
    dkv = functools.partial(_run_dkv, (q, k, v, *shared, lse, grad_out, delta, grad_k, grad_v), options)
    dkv(tuning.best("attention_backward_kv", shape_class(q, k, after, q_marks), _dkv_candidates(q), dkv))
    return grads


@attention_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _grads(q, k, others[7])


def _grads(q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), lse.new_empty(lse.shape)


def _run_dq(tensors: tuple[Tensor | None, ...], options: tuple[int, int, float], chosen: tuning.Tiles) -> None:
    q, k, v, bias, cos, grad_out = (tensors[i] for i in (0, 1, 2, 3, 6, 10))
    assert q is not None and k is not None and v is not None and grad_out is not None
    before, after, scale = options
    rows, queries, heads, _ = q.shape
    groups = heads // k.shape[2]
    strides = *(n for x in (q, k, v, grad_out) for n in x.stride()[:3]), *bias_strides(bias), rope_stride(cos)
    sizes = queries, k.shape[1], heads, rows * heads, before, after, together(k, groups)
    grid = (triton.cdiv(queries, chosen["BLOCK_M"]) * rows * heads,)
    launch(_attention_backward_q_kernel, grid, *tensors, *strides, *sizes, **constants(q, groups, scale), **chosen)


def _run_dkv(tensors: tuple[Tensor | None, ...], options: tuple[int, int, float], chosen: tuning.Tiles) -> None:
    q, k, v, bias, cos, grad_out = (tensors[i] for i in (0, 1, 2, 3, 6, 9))
    assert q is not None and k is not None and v is not None and grad_out is not None
    before, after, scale = options
    rows, keys, heads, _ = k.shape
    groups = q.shape[2] // heads
    strides = *(n for x in (q, k, v, grad_out) for n in x.stride()[:3]), *bias_strides(bias), rope_stride(cos)
    sizes = q.shape[1], keys, heads, rows * heads, before, after, together(q, 1)
    grid = (triton.cdiv(keys, chosen["BLOCK_N"]) * rows * heads,)
    launch(_attention_backward_kv_kernel, grid, *tensors, *strides, *sizes, **constants(q, groups, scale), **chosen)


def _dq_candidates(q: Tensor) -> list[tuning.Tiles]:
    return [{"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}]


def _dkv_candidates(q: Tensor) -> list[tuning.Tiles]:
    return [{"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}]
