"""Compares an op with its float64 reference, forward and every gradient, for the tests of the kernels.

One process tests one device: the GPU where there is one, else the CPU, where Triton's kernels run in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Largest error by dtype, relative to the largest element of the expected result."""

dtypes = st.sampled_from(list(TOLERANCE))
layouts = st.sampled_from(["plain", "slice", "transposed", "strided"])
quick = settings(max_examples=25, deadline=None, derandomize=True)
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
Op = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout: slice of a wider tensor, transposed, every other element, or plain."""
    if layout == "slice":
        wider = torch.cat((x, torch.full_like(x, torch.nan)), -1)
        return wider[..., : x.shape[-1]]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    return x


def assert_matches_reference(
    backend: str,
    op: Op,
    reference_op: Op,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    layout: str = "plain",
) -> None:
    """``op`` on ``dtype`` inputs equals ``reference_op`` on the same numbers in float64, and so does every gradient.

    ``op`` runs on ``backend``. It must leave its inputs unchanged and give the same gradients when the backward pass
    runs again.
    """
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    exact_leaves = [x.detach().double().clone().requires_grad_() for x in leaves]
    with kernels.force(backend):  # type: ignore[arg-type]
        outputs = _as_tuple(op(*(with_layout(x, layout) for x in leaves)))
    expected = _as_tuple(reference_op(*exact_leaves))
    weights = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape) for y in expected]
    loss = sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True))
    sum((y * w).sum() for y, w in zip(expected, weights, strict=True)).backward()
    grads = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
    grads_again = torch.autograd.grad(loss, leaves, materialize_grads=True)
    for y, expected_y in zip(outputs, expected, strict=True):
        assert_close(y, expected_y, dtype)
    for grad, grad_again, exact in zip(grads, grads_again, exact_leaves, strict=True):
        assert torch.equal(grad, grad_again), "the backward pass gave something else the second time"
        assert grad.dtype == dtype
        assert_close(grad, torch.zeros_like(exact) if exact.grad is None else exact.grad, dtype)
    for leaf, exact in zip(leaves, exact_leaves, strict=True):
        assert torch.equal(leaf.double(), exact), "an op changed its input"


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """``actual`` has the shape of ``expected``, is finite and within the tolerance of ``dtype``."""
    assert actual.shape == expected.shape
    scale = expected.detach().abs().max().clamp(min=0.1) if expected.numel() else 1.0
    assert actual.isfinite().all()
    assert expected.numel() == 0 or ((actual.double() - expected).abs().max() / scale).item() <= TOLERANCE[dtype]


def _as_tuple(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def _patch_interpreter_to_rewrite_once() -> None:
    """Makes Triton's interpreter patch its language once per launch, not at every call of a device function.

    Patching takes half of the interpreter's time and gives the same result each time.
    """
    call, run = interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__
    patched = set()

    def call_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(function.fn)
        return call(function, *args, **kwargs)

    def run_grid(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(executor, *args, **kwargs)

    interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__ = call_function, run_grid


_patch_interpreter_to_rewrite_once()
