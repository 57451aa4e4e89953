"""How every kernel is started: one place, which knows the interpreter and lets a test compile without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run on the CPU through Triton's interpreter (TRITON_INTERPRET=1 before Triton is first imported)."""

Start = Callable[..., None]
_recorder: Start | None = None


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Runs ``grid`` programs of a kernel on the device of its first tensor. ``options`` are constants and tile choices."""
    if _recorder is not None:
        _recorder(kernel, *args, **options)
        return
    device = next(a for a in args if isinstance(a, Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[tuple(grid)](*args, **options)
    else:
        kernel[tuple(grid)](*args, **options)


@contextlib.contextmanager
def recording(recorder: Start) -> Iterator[None]:
    """Hands every launch to ``recorder`` and runs none: what an op would start, on a machine that cannot start it."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


@triton.jit
def dot(a, b, acc, precision: tl.constexpr = "ieee"):
    """Acc + a @ b in the format of acc (float32, or float64).

    float32 operands are multiplied as ``precision`` says. The interpreter multiplies the bits of bfloat16 as if they were
    integers, and sums float16 in float16, so there both are widened first.
    """
    if INTERPRETED:
        return acc + tl.dot(a.to(acc.dtype), b.to(acc.dtype), out_dtype=acc.dtype)
    return tl.dot(a, b, acc, input_precision=precision, out_dtype=acc.dtype)
