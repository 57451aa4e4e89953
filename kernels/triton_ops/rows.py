"""What the kernels over rows share: a tensor as rows, programs that walk over them, dropout, and sums over programs."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.tuning import Tiles


def as_rows(x: Tensor) -> Tensor:
    """X (..., D) as (R, D) with a step of 1 between the elements of a row: a view where there is one, else a copy."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The format of statistics and sums: float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in the interpreter, so that a program has several blocks of rows to walk over."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


MAX_WIDTH = 1 << 15
"""Wider rows do not fit the registers of one program: torch's own ops take them."""

RESIDENT_WARPS = 16
"""Warps that a multiprocessor surely holds at once: those that fit with 128 registers a thread."""


def forward_tiles(width: int) -> list[Tiles]:
    """Whole rows of ``width``, first of all 32 elements a thread: four 16-byte loads of bfloat16, in 64 registers."""
    return _tiles(width, (4096, 32), (4096, 16), (2048, 16))


def backward_tiles(width: int) -> list[Tiles]:
    """16 elements a thread, which holds three numbers for each, and how many blocks of rows are loaded up to the one at work.

    32 warps have 64 registers a thread, and so none for a second block.
    """
    tiles = _tiles(width, (2048, 16), (4096, 16))
    return [{**t, "STAGES": stages} for t in tiles for stages in ((2, 1, 3) if t["num_warps"] < 32 else (1,))]


def _tiles(width: int, *choices: tuple[int, int]) -> list[Tiles]:
    """For each (elements of a program, elements of a thread) of ``choices``; a program is a whole row at least."""
    block, tiles = max(triton.next_power_of_2(width), 16), []
    for elements, per_thread in choices:
        elements = max(elements, block)
        warps = min(max(elements // (32 * per_thread), 4), 32)
        tiles.append({"BLOCK_R": elements // block, "BLOCK_D": block, "num_warps": warps})
    return [t for n, t in enumerate(tiles) if t not in tiles[:n]]


def tile(width: int, elements: int) -> Tiles:
    """Part of a few rows, for kernels to which a row is nothing: ``elements`` in all, and whole lines of memory."""
    block = min(max(triton.next_power_of_2(width), 16), 1024)
    return {"BLOCK_R": elements // block, "BLOCK_D": block, "num_warps": 4}


def programs(n_rows: int, tiles: Tiles, device: torch.device) -> int:
    """Programs that walk over the rows: as many as run at once, or fewer where there is less to do."""
    at_once = processors(device) * max(RESIDENT_WARPS // tiles["num_warps"], 1)
    return min(at_once, triton.cdiv(n_rows, tiles["BLOCK_R"]))


@triton.jit
def keep(seed, rows, width, THRESHOLD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dropout's mask [BLOCK_R, BLOCK_D] of whole ``rows`` [BLOCK_R, 1]: see kernels.philox."""
    calls = rows.to(tl.int64) * ((width + 3) // 4) + tl.arange(0, BLOCK_D // 4)[None, :]
    a, b, c, d = tl.randint4x(seed, calls)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_R, BLOCK_D))
    return words >= THRESHOLD


@triton.jit
def _column_sums_kernel(
    partial_ptr,  # (P, D)
    out_ptr,  # (D,)
    parts,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sums = tl.zeros([BLOCK_P, BLOCK_D], partial_ptr.dtype.element_ty)
    for start in range(0, parts, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)[:, None]
        sums += tl.load(partial_ptr + rows * width + columns, mask=(rows < parts) & (columns < width), other=0.0)
    total = tl.sum(sums, 0, keep_dims=True)
    tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over programs of what each has summed, (P, D) -> (D,), always in the same order, rounded once to ``dtype``."""
    parts, width = partial.shape
    out = partial.new_empty(width, dtype=dtype)
    if width:
        launch(
            _column_sums_kernel,
            (triton.cdiv(width, 64),),
            partial,
            out,
            parts,
            width,
            BLOCK_P=32,
            BLOCK_D=64,
            num_warps=4,
        )
    return out
