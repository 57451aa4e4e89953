"""Chooses the implementation of the ops, Triton or torch. Nothing else decides it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

import kernels.torch_ops as torch_ops

Choice = Literal["auto", "triton", "torch"]
_choice: Choice = "auto"
# Evaluated at import: torch.compile traces ``implementation``, and can trace neither of these calls.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use(choice: Choice, device: torch.device) -> str:
    """Sets the implementation for this process; returns, as a phrase, which one runs on ``device`` and why.

    ``auto`` is Triton on CUDA and torch elsewhere. Raises ValueError, with the cure, if Triton is requested and cannot
    run.
    """
    global _choice
    if choice == "triton":
        _check_triton(device)
    _choice = choice
    if choice == "torch":
        return "torch's own, as kernels=torch asks"
    if choice == "triton":
        return "Triton's, as kernels=triton asks" + (", interpreted on the CPU: slow" if device.type == "cpu" else "")
    if device.type == "cuda":
        return "Triton's, on CUDA" if _HAS_TRITON else "torch's own: Triton is not installed"
    return "torch's own: no CUDA device"


@contextlib.contextmanager
def force(choice: Choice) -> Iterator[None]:
    """Context in which ``choice`` runs instead of the choice of ``use``: for tests and benchmarks."""
    global _choice
    previous, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = previous


def implementation(x: Tensor) -> ModuleType:
    """The module that implements the ops for tensors on the device of ``x``: ``triton_ops`` or ``torch_ops``."""
    if _choice == "torch" or not _HAS_TRITON or not (x.is_cuda or (_choice == "triton" and _INTERPRETED)):
        return torch_ops
    import kernels.triton_ops as triton_ops  # imported late: Triton loads only where it runs

    return triton_ops


def torch_only(feature: str) -> ModuleType:
    """Returns ``torch_ops`` for a feature without a Triton kernel. Raises ValueError if the choice is ``triton``."""
    if _choice == "triton":
        raise ValueError(f"kernels=triton, but there is no Triton kernel for {feature}: kernels=auto or kernels=torch")
    return torch_ops


def measuring_tiles() -> contextlib.AbstractContextManager[None]:
    """Context in which Triton kernels measure tile sizes for shapes that are new to this machine (``tuning``)."""
    if _choice == "torch" or not _HAS_TRITON:
        return contextlib.nullcontext()
    import kernels.tuning as tuning

    return tuning.measuring_tiles()


def _check_triton(device: torch.device) -> None:
    """Raises ValueError where Triton is not installed, or would run on a CPU without its interpreter."""
    if not _HAS_TRITON:
        raise ValueError("kernels=triton, but Triton is not installed: pip install triton, or kernels=auto")
    if device.type == "cpu" and not _INTERPRETED:
        raise ValueError(
            "kernels=triton on a CPU runs in Triton's interpreter, thousands of times slower: for a look or a test, "
            "set TRITON_INTERPRET=1 in the environment; else kernels=auto"
        )
