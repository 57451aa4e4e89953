"""Starts every Triton kernel, or records launches for compilation without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""True if kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1 set before Triton is first imported)."""

LaunchRecorder = Callable[..., None]
_recorder: LaunchRecorder | None = None


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Runs ``grid`` programs of a kernel on the device of its first tensor; ``options`` are constexprs and tiles."""
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
def recording_launches(recorder: LaunchRecorder) -> Iterator[None]:
    """Context in which launches go to ``recorder`` and nothing runs: shows what an op would launch, without a GPU."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


@triton.jit
def dot(a, b, acc, precision: tl.constexpr = "ieee"):
    """Matrix product acc + a @ b, in the dtype of acc (float32 or float64).

    float32 operands are multiplied with ``precision``. In the interpreter the operands are upcast first, because it
    multiplies the bits of bfloat16 as if they were integers and sums float16 in float16.
    """
    if INTERPRETED:
        return acc + tl.dot(a.to(acc.dtype), b.to(acc.dtype), out_dtype=acc.dtype)
    return tl.dot(a, b, acc, input_precision=precision, out_dtype=acc.dtype)
