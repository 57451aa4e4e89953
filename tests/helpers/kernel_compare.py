"""How kernel tests compare: every op against the float64 reference, on each implementation, forward and every gradient.

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
"""Largest error by dtype, as a share of the largest element of the right answer."""

dtypes = st.sampled_from(list(TOLERANCE))
quick = settings(max_examples=25, deadline=None, derandomize=True)
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
Op = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def laid_out(x: Tensor, how: str) -> Tensor:
    """The same numbers in another layout: a slice of a wider tensor, transposed memory, every other element, as made."""
    if how == "slice":
        wider = torch.cat((x, torch.full_like(x, torch.nan)), -1)
        return wider[..., : x.shape[-1]]
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "strided":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    return x


layouts = st.sampled_from(["plain", "slice", "transposed", "strided"])


def agree(backend: str, op: Op, right: Op, inputs: Sequence[Tensor], dtype: torch.dtype, layout: str = "plain") -> None:
    """``op`` on ``dtype`` inputs equals ``right`` on the same numbers in float64, and so do all gradients, twice.

    ``op`` runs on ``backend``. Its inputs must be unchanged, its gradients the same when the backward pass runs again.
    """
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().clone().requires_grad_() for x in leaves]
    with kernels.force(backend):  # type: ignore[arg-type]
        outs = _as_tuple(op(*(laid_out(x, layout) for x in leaves)))
    wants = _as_tuple(right(*exact))
    weights = [torch.linspace(-1, 1, w.numel(), dtype=torch.float64, device=w.device).view(w.shape) for w in wants]
    loss = sum((o.double() * w).sum() for o, w in zip(outs, weights, strict=True))
    sum((o * w).sum() for o, w in zip(wants, weights, strict=True)).backward()
    grads = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
    again = torch.autograd.grad(loss, leaves, materialize_grads=True)
    for got, want in zip(outs, wants, strict=True):
        close(got, want, dtype)
    for first, second, e in zip(grads, again, exact, strict=True):
        assert torch.equal(first, second), "the backward pass gave something else the second time"
        assert first.dtype == dtype
        close(first, torch.zeros_like(e) if e.grad is None else e.grad, dtype)
    assert all(torch.equal(x.double(), e) for x, e in zip(leaves, exact, strict=True)), "an op changed its input"


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """``got`` has the shape of ``want`` and is as near to it as ``dtype`` allows."""
    assert got.shape == want.shape
    scale = want.detach().abs().max().clamp(min=0.1) if want.numel() else 1.0
    assert got.isfinite().all()
    assert want.numel() == 0 or ((got.double() - want).abs().max() / scale).item() <= TOLERANCE[dtype]


def _as_tuple(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def _patch_once_a_launch() -> None:
    """Triton's interpreter prepares its language anew at every call of a device function: half of its time, for nothing."""
    call, run = interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__
    ready = set()

    def called(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn in ready:
            return function.rewrite()(*args, **kwargs)
        ready.add(function.fn)
        return call(function, *args, **kwargs)

    def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        ready.clear()
        return run(executor, *args, **kwargs)

    interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__ = called, launched


_patch_once_a_launch()
