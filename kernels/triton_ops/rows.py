"""Shared by the row-wise kernels: row views, tile choices, the dropout mask, and sums over programs."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.requirements import limits_of
from kernels.tuning import Tiles


def as_rows(x: Tensor) -> Tensor:
    """View of x (..., D) as (R, D) with stride 1 along D; a copy where there is no such view."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of statistics and sums: float64 where an input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in the interpreter, so that a program has several blocks of rows to walk over."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


MAX_WIDTH = 1 << 15
"""Widest row that fits the registers of one program; wider rows run on torch's own ops."""

RESIDENT_WARPS = 16
"""Warps that fit a multiprocessor at 128 registers per thread."""

PREFETCHED_INPUTS = 3
"""Of a norm's backward pass: its two gradients, by the normed rows and by their sum, and that sum."""

REDUCTION_BYTES = 1 << 10
"""Shared memory in which the warps of a program add up a row, at most."""


def forward_tiles(width: int) -> list[Tiles]:
    """Candidates for a forward pass over whole rows of ``width``, the default first.

    The default gives a thread 32 elements: four 16-byte loads of bfloat16, in 64 registers.
    """
    return _row_tiles(width, (4096, 32), (4096, 16), (2048, 16))


def backward_tiles(x: Tensor) -> list[Tiles]:
    """Candidates for a backward pass over whole rows of x (..., D), the default first; STAGES is the prefetch depth.

    The default gives a thread 16 elements, for each of which it holds three numbers. 32 warps have 64 registers per
    thread, so they have none for a second block. The prefetched blocks of the three inputs must fit the shared memory
    of x's device.
    """
    limits = limits_of(x.device)
    candidates = []
    for tiles in _row_tiles(x.shape[-1], (2048, 16), (4096, 16)):
        block_bytes = PREFETCHED_INPUTS * tiles["BLOCK_R"] * tiles["BLOCK_D"] * x.element_size()
        deepest = 3 if limits is None else (limits.shared_bytes - REDUCTION_BYTES) // block_bytes
        stage_choices = (2, 1, 3) if tiles["num_warps"] < 32 else (1,)
        candidates += [{**tiles, "STAGES": stages} for stages in stage_choices if stages <= max(deepest, 1)]
    return candidates


def _row_tiles(width: int, *choices: tuple[int, int]) -> list[Tiles]:
    """Tiles for ``choices`` of (elements of a program, elements of a thread); a program takes at least a row."""
    block_d = max(triton.next_power_of_2(width), 16)
    candidates: list[Tiles] = []
    for elements, per_thread in choices:
        elements = max(elements, block_d)
        warps = min(max(elements // (32 * per_thread), 4), 32)
        tiles = {"BLOCK_R": elements // block_d, "BLOCK_D": block_d, "num_warps": warps}
        if tiles not in candidates:
            candidates.append(tiles)
    return candidates


def elementwise_tiles(width: int, elements: int) -> Tiles:
    """Tile of ``elements`` elements for pointwise kernels: at most 1024 columns of some rows, in whole memory lines."""
    block_d = min(max(triton.next_power_of_2(width), 16), 1024)
    return {"BLOCK_R": elements // block_d, "BLOCK_D": block_d, "num_warps": 4}


def persistent_programs(n_rows: int, tiles: Tiles, device: torch.device) -> int:
    """Number of programs that walk over the rows: as many as run at once, or as there are blocks of rows."""
    resident = multiprocessor_count(device) * max(RESIDENT_WARPS // tiles["num_warps"], 1)
    return min(resident, triton.cdiv(n_rows, tiles["BLOCK_R"]))


@triton.jit
def dropout_mask(seed, rows, width, THRESHOLD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dropout's mask [BLOCK_R, BLOCK_D] of whole ``rows`` [BLOCK_R, 1], equal to ``kernels.philox.dropout_mask``."""
    counters = rows.to(tl.int64) * ((width + 3) // 4) + tl.arange(0, BLOCK_D // 4)[None, :]
    a, b, c, d = tl.randint4x(seed, counters)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_R, BLOCK_D))
    return bits >= THRESHOLD


@triton.jit
def _column_sums_kernel(
    partial_ptr,  # (P, D)
    out_ptr,  # (D,), written
    n_parts,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sums = tl.zeros([BLOCK_P, BLOCK_D], partial_ptr.dtype.element_ty)
    for start in range(0, n_parts, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)[:, None]
        sums += tl.load(partial_ptr + row * width + column, mask=(row < n_parts) & (column < width), other=0.0)
    total = tl.sum(sums, 0, keep_dims=True)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the programs' parts, (P, D) -> (D,), in a fixed order, rounded once to ``dtype``."""
    n_parts, width = partial.shape
    out = partial.new_empty(width, dtype=dtype)
    tiles = {"BLOCK_P": 32, "BLOCK_D": 64, "num_warps": 4}
    if width:
        grid = (triton.cdiv(width, tiles["BLOCK_D"]),)
        launch(_column_sums_kernel, grid, partial, out, n_parts, width, **tiles)
    return out
