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

import kernels.requirements as requirements
import kernels.torch_ops as torch_ops

Choice = Literal["auto", "triton", "torch"]
_choice: Choice = "auto"
_assumes_gpu = False
# Evaluated at import: torch.compile traces ``implementation``, and can trace neither of these calls.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
_NOT_INTERPRETED = (
    "on a CPU it runs in Triton's interpreter, thousands of times slower: for a look or a test, set "
    "TRITON_INTERPRET=1 in the environment"
)


def use(choice: Choice, device: torch.device) -> str:
    """Sets the implementation for this process; returns, as a phrase, which one runs on ``device`` and why.

    ``auto`` is Triton on a CUDA device that it can run on, and torch elsewhere. Raises ValueError, with the cure, if
    Triton is requested and cannot run.
    """
    global _choice
    if choice == "torch":
        _choice = choice
        return "torch's own, as kernels=torch asks"
    problem = _why_not_triton(device)
    if choice == "triton":
        if problem is not None:
            raise ValueError(f"kernels=triton, but {problem}; or kernels=auto")
        _choice = choice
        return "Triton's, as kernels=triton asks" + (", interpreted on the CPU: slow" if device.type == "cpu" else "")
    if device.type != "cuda":
        _choice = choice
        return "torch's own: no CUDA device"
    _choice = choice if problem is None else "torch"
    return "Triton's, on CUDA" if problem is None else f"torch's own: {problem}"


@contextlib.contextmanager
def force(choice: Choice) -> Iterator[None]:
    """Context in which ``choice`` runs instead of the choice of ``use``: for tests and benchmarks."""
    global _choice
    previous, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = previous


@contextlib.contextmanager
def assuming_gpu() -> Iterator[None]:
    """Context in which tensors of a CPU are taken for a GPU's: for planning, where they have shapes and no numbers."""
    global _assumes_gpu
    before, _assumes_gpu = _assumes_gpu, True
    try:
        yield
    finally:
        _assumes_gpu = before


def implementation(x: Tensor) -> ModuleType:
    """The module that implements the ops for tensors on the device of ``x``: ``triton_ops`` or ``torch_ops``."""
    on_triton = x.is_cuda or _assumes_gpu or (_choice == "triton" and _INTERPRETED)
    if _choice == "torch" or not _HAS_TRITON or not on_triton:
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


def _why_not_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on ``device``, in words that name the cure; None where they can."""
    if not _HAS_TRITON:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        return None if _INTERPRETED else _NOT_INTERPRETED
    limits = requirements.limits_of(device)
    return None if limits is None else requirements.obstacle(limits, requirements.find_toolchain())
