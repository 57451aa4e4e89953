"""A rank's device: what it is, as plain values that decisions are made from, and the seed of its random numbers."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

BF16_CAPABILITY = (8, 0)
"""The first CUDA compute capability whose tensor cores multiply bf16 (Ampere)."""


@dataclass(frozen=True)
class Device:
    """A device: its type as torch names it, its maker's name, and whether it multiplies matrices in bf16."""

    type: str
    """"cpu" or "cuda"."""
    name: str
    bf16: bool


def describe(device: torch.device) -> Device:
    """The device that ``device`` stands for on this host.

    Of CPUs the processor's own flags are asked: ``torch.ops.mkldnn._is_mkldnn_bf16_supported`` is also true where
    AVX-512 without bf16 instructions only emulates them, slower than fp32.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
        return Device("cuda", torch.cuda.get_device_name(device), bf16)
    flags = torch.cpu.get_capabilities()
    bf16 = bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    return Device("cpu", f"{platform.machine()} CPU, {os.cpu_count()} cores", bf16)


def seed_device(seed: int, device: torch.device) -> None:
    """Seeds the generators that draw on the CPU and on ``device``, to the numbers that ``torch.manual_seed`` gives.

    That one also asks accelerators that are not there to remember the seed, each with a formatted stack: half a
    millisecond, of every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
