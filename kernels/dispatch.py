"""Which implementation runs: the one place that chooses between the Triton kernels and torch."""

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
# Found out once: torch.compile traces ``ops``, and can trace neither question.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use(choice: Choice, device: torch.device) -> str:
    """Sets what runs from now on in this process, and returns in words what that is on ``device``, and why.

    ``auto`` is Triton on CUDA and torch elsewhere. Raises ValueError, with the cure, where Triton was asked for and cannot run.
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
    """Within, ``choice`` runs: for tests and benchmarks."""
    global _choice
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def ops(x: Tensor) -> ModuleType:
    """The module whose functions run for a tensor like ``x``."""
    if _choice == "torch" or not _HAS_TRITON or not (x.is_cuda or (_choice == "triton" and _INTERPRETED)):
        return torch_ops
    import kernels.triton_ops as triton_ops  # Triton loads where it runs, and only there

    return triton_ops


def torchs(what: str) -> ModuleType:
    """Torch's ops, for what Triton's have no kernel. Raises ValueError, with the cure, where Triton's were asked for."""
    if _choice == "triton":
        raise ValueError(f"kernels=triton, but there is no Triton kernel for {what}: kernels=auto or kernels=torch")
    return torch_ops


def measuring() -> contextlib.AbstractContextManager[None]:
    """Within, Triton's kernels measure which tiles are fastest for shapes they have not met on this machine (kernels.tuning)."""
    if _choice == "torch" or not _HAS_TRITON:
        return contextlib.nullcontext()
    import kernels.tuning as tuning

    return tuning.measuring()


def _check_triton(device: torch.device) -> None:
    if not _HAS_TRITON:
        raise ValueError("kernels=triton, but Triton is not installed: pip install triton, or kernels=auto")
    if device.type == "cpu" and not _INTERPRETED:
        raise ValueError(
            "kernels=triton on a CPU runs in Triton's interpreter, thousands of times slower: for a look or a test, "
            "set TRITON_INTERPRET=1 in the environment; else kernels=auto"
        )
