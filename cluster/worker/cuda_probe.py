"""Whether CUDA can be used on a host, found out once and without starting it in the process that forks the workers.

CUDA does not survive a fork, so the fork server must not start it. Imports ask torch whether there is a GPU, and torch
starts CUDA to answer where NVML cannot: where a card is split into MIG instances, and in containers without NVML.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
from collections.abc import Iterator
from pathlib import Path

import torch

from train.errors import ExitCode

PROBE_S = 120.0
"""How long CUDA may take to start: a machine with eight GPUs whose driver is not kept loaded takes half a minute."""
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


@contextlib.contextmanager
def answer_without_cuda(gpus: int) -> Iterator[None]:
    """Has torch say, without asking CUDA, that there are so many GPUs."""
    kept = torch.cuda.is_available, torch.cuda.device_count
    torch.cuda.is_available, torch.cuda.device_count = lambda: gpus > 0, lambda: gpus
    try:
        yield
    finally:
        torch.cuda.is_available, torch.cuda.device_count = kept


class CudaProbe:
    """A process that starts CUDA beside the imports, and ends; forked from one in which CUDA was never started."""

    def __init__(self) -> None:
        self._answer, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.write(write, _start_cuda().encode())
            os._exit(ExitCode.OK)
        os.close(write)
        self._failure: str | None = None

    def failure(self) -> str:
        """Why CUDA cannot be used on this host, in words; empty where it can. Waits for the process's answer."""
        if self._failure is None:
            answered = select.select([self._answer], [], [], PROBE_S)[0]
            text = os.read(self._answer, 1 << 16).decode() if answered else ""
            late = f"it has not answered for {PROBE_S:.0f} s" if not answered else "its process has ended"
            self._failure = text.strip() if text else explain(late, versions())
            os.close(self._answer)
        return self._failure


def _start_cuda() -> str:
    """Starts CUDA: the error as ``explain`` says it, or a blank line."""
    try:
        torch.cuda.init()
        return "\n" if torch.cuda.device_count() else explain("torch sees no device", versions())
    except Exception as error:
        return explain(str(error), versions())


def explain(error: str, said: str) -> str:
    """CUDA's ``error`` in words, with the versions that it may lie at."""
    first = error.strip().splitlines()[0] if error.strip() else "no reason was given"
    return f"CUDA cannot be started on this host: {first.rstrip('.')}. {said}"


def versions() -> str:
    """The versions of CUDA that torch and the driver of this host have, and what to do where they do not fit."""
    return describe_versions(torch.__version__, torch.version.cuda, _driver_version(), _driver_cuda())


def describe_versions(torch_version: str, built_for: str | None, driver: str | None, supports: str | None) -> str:
    """In words: CUDA that torch was ``built_for``, the NVIDIA ``driver`` and the newest CUDA that it ``supports``."""
    cpu = "or train on the CPU: cluster.device=cpu"
    if built_for is None:
        return f"PyTorch {torch_version} is a build without CUDA: install one with it, {cpu}"
    if driver is None and supports is None:
        return (
            f"PyTorch {torch_version} is built for CUDA {built_for}, and no NVIDIA driver answers here: install it "
            f"(in a container: run it with access to the GPUs), {cpu}"
        )
    has = f"PyTorch {torch_version} is built for CUDA {built_for}; the NVIDIA driver is {driver or 'unknown'}"
    has += f", for CUDA {supports} and older" if supports else ", and its libcuda.so.1 cannot be loaded"
    if supports and int(supports.split(".")[0]) < int(built_for.split(".")[0]):
        return f"{has}: install a newer driver, or PyTorch built for CUDA {supports} or older, {cpu}"
    return f"{has}: nvidia-smi and the kernel's log (dmesg) say more about the device; {cpu}"


def _driver_version() -> str | None:
    """The version of the NVIDIA kernel module, such as "550.54.15"."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module\D*?([0-9]+(?:\.[0-9]+)+)", DRIVER_VERSION.read_text("utf-8"))
        return found[1] if found else None
    return None


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver supports, such as "12.4"; asking starts nothing."""
    with contextlib.suppress(OSError, AttributeError):
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            return f"{number.value // 1000}.{number.value % 1000 // 10}"
    return None
