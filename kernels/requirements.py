"""The least that Triton's kernels need of a GPU and its host, and the limits of the GPU that tiles are chosen for.

Every decision here is a function of what was found; only ``limits_of`` and ``find_toolchain`` look at the machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

MIN_CAPABILITY = (8, 0)
"""Ampere, the first with bfloat16 and TF32 products and asynchronous copies, which the kernels' loops are built on."""

MIN_SHARED_BYTES = 99 << 10
"""Shared memory of a block on sm_86, sm_89 and sm_120, the least from Ampere on: every kernel has tiles that fit it."""

TMA_CAPABILITY = (9, 0)
"""Hopper, the first that reads tiles by tensor descriptors."""


@dataclass(frozen=True)
class DeviceLimits:
    """Compute capability of a GPU, and the shared memory in bytes that a block may opt in to."""

    capability: tuple[int, int]
    shared_bytes: int

    @property
    def products(self) -> Literal["mma", "wgmma", "tcgen05"]:
        """The instruction that Triton 3.7 makes of a matrix product; it decides where operands and sums are kept."""
        return {9: "wgmma", 10: "tcgen05"}.get(self.capability[0], "mma")  # type: ignore[return-value]


@dataclass(frozen=True)
class Toolchain:
    """Findings about the C compiler and the header with which Triton builds its launcher at a machine's first start."""

    cc: str | None
    """$CC, which Triton takes before any other compiler."""
    compiler: str | None
    """Path of the compiler that would run: $CC, else gcc, else clang."""
    include: Path
    """Folder in which Python's headers belong."""
    has_python_header: bool


_assumed: DeviceLimits | None = None


def obstacle(limits: DeviceLimits, toolchain: Toolchain) -> str | None:
    """Why Triton's kernels cannot run on a CUDA device, in words that name the cure; None where they can."""
    if limits.capability < MIN_CAPABILITY:
        found, needed = ("sm_{}{}".format(*c) for c in (limits.capability, MIN_CAPABILITY))
        return f"this GPU is {found}, and Triton's kernels need {needed} (Ampere) or newer"
    if limits.shared_bytes < MIN_SHARED_BYTES:
        found_kib, needed_kib = limits.shared_bytes >> 10, MIN_SHARED_BYTES >> 10
        return f"this GPU gives a block {found_kib} KiB of shared memory, and Triton's kernels need {needed_kib}"
    if toolchain.compiler is None and toolchain.cc is not None:
        return f"CC={toolchain.cc} names no program: Triton needs a C compiler (gcc or clang; no arguments in CC)"
    if toolchain.compiler is None:
        return "Triton needs a C compiler: install gcc or clang (apt-get install gcc), or name one in CC"
    if not toolchain.has_python_header:
        where = f"Triton needs Python.h, which is not in {toolchain.include}"
        return f"{where}: install Python's headers (apt-get install python3-dev)"
    return None


def find_toolchain() -> Toolchain:
    """Looks for the compiler and the header as Triton does (``triton/runtime/build.py``)."""
    cc = os.environ.get("CC")
    compiler = shutil.which("gcc") or shutil.which("clang") if cc is None else shutil.which(cc)
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own scheme keeps no headers
    include = Path(sysconfig.get_paths(scheme=scheme)["include"])
    return Toolchain(cc, compiler, include, (include / "Python.h").is_file())


def limits_of(device: torch.device) -> DeviceLimits | None:
    """Limits of a CUDA device; None in the interpreter, which runs any tiles."""
    if _assumed is not None:
        return _assumed
    return _read_limits(device) if device.type == "cuda" else None


@functools.cache
def _read_limits(device: torch.device) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(device)
    shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return DeviceLimits((properties.major, properties.minor), shared_bytes)


@contextlib.contextmanager
def assuming_limits(limits: DeviceLimits) -> Iterator[None]:
    """Context in which tiles are chosen for a GPU of these limits: kernels are compiled for GPUs that are not here."""
    global _assumed
    previous, _assumed = _assumed, limits
    try:
        yield
    finally:
        _assumed = previous
