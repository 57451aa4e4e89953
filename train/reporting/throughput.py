"""Speed of a run: tokens per second, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
import time

import torch

PEAKS = (
    # GB200 and GB300 NVL72 data sheets: 360 PFLOPS in bf16 with sparsity over 72 GPUs, 80 TFLOPS each in fp32
    (r"GB[23]00", 2500e12, 80e12),
    # HGX B200 and B300 data sheets: 36 PFLOPS in bf16 with sparsity and 600 TFLOPS in fp32 over 8 GPUs
    (r"B[23]00", 2250e12, 75e12),
    # Hopper: data sheets of GH200, H100 and H200, whose bf16 is with sparsity
    (r"GH200", 989e12, 67e12),
    (r"H[12]00.*NVL", 835e12, 60e12),
    (r"H[18]00 PCIe", 756e12, 51e12),
    (r"H([12]|8)00\b", 989e12, 67e12),
    (r"H20\b", 148e12, 44e12),
    # Ampere: data sheets of A100, A30, A40 and A10, white paper of GA102
    (r"A[18]00\b", 312e12, 19.5e12),
    (r"A30\b", 165e12, 10.3e12),
    (r"A40\b", 149.7e12, 37.4e12),
    (r"A10G", 70e12, 35e12),
    (r"A10\b", 125e12, 31.2e12),
    (r"RTX A6000", 154.8e12, 38.7e12),
    (r"RTX 3090 Ti$", 80e12, 40e12),
    (r"RTX 3090$", 71e12, 35.6e12),
    # Ada: data sheets of L40S, L40, L20 and L4, white paper of the Ada architecture
    (r"L40S", 362e12, 91.6e12),
    (r"L40\b", 181e12, 90.5e12),
    (r"L20\b", 119.5e12, 59.8e12),
    (r"L4\b", 121e12, 30.3e12),
    (r"RTX 6000 Ada", 364.2e12, 91.1e12),
    (r"RTX 4090$", 165.2e12, 82.6e12),
    # White papers of RTX Blackwell and RTX PRO; of the server edition the data sheet's fp32, and four times that
    (r"RTX PRO 6000 Blackwell Max-Q", 438.9e12, 109.7e12),
    (r"RTX PRO 6000 Blackwell Server", 480e12, 120e12),
    (r"RTX PRO 6000 Blackwell Workstation", 503.8e12, 126e12),
    (r"RTX 5090$", 209.5e12, 104.8e12),
    (r"V100-SXM", 125e12, 15.7e12),
    (r"Tesla T4", 65e12, 8.1e12),
    (r"MI3(00|25)X", 1307e12, 163.4e12),
)
"""Dense FLOP/s in bf16 (and fp16) and in fp32 by device name, the first match wins; from the makers' documents.

Where these give rates with 2:4 sparsity, it is half of them. bf16 adds up in fp32, which GeForce cards do at half the
rate. fp32 is that of plain fp32 arithmetic, in which torch multiplies matrices unless it is told otherwise, not TF32.
"""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device as ``torch.cuda.get_device_name`` names it; None where unknown, on CPUs and on a part of
    a GPU (MIG).
    """
    if " MIG " in device_name:
        return None
    rates = next(((half, full) for pattern, half, full in PEAKS if re.search(pattern, device_name)), None)
    return rates and rates[precision == "fp32"]


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Tokens of all workers per second; 0 where no time has passed."""
    return tokens / seconds if seconds > 0 else 0.0


def utilization(tokens_per_s: float, flops_per_token: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, between 0 and 1 (PaLM, appendix B): FLOPs of the model over peak FLOPs of the devices.

    ``tokens_per_s`` is of all devices together. Recomputed activations do not count as work. None without a peak.
    """
    return None if peak is None else tokens_per_s * flops_per_token / (devices * peak)


TYPICAL_SHARE = 0.5
"""Share of the rate of bare matrix products that a training step of a small model reaches: for estimates only."""


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.02) -> float:
    """FLOP/s of matrix products of random numbers on ``device``, measured for about ``seconds``.

    Random, since a GPU clocks higher on numbers that flip fewer bits; several at once, so that it does not wait for the
    host.
    """
    size, at_once = (8192, 4) if device.type == "cuda" else (256, 1)
    a = torch.randn(size, size, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(at_once):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    began, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not products:  # a busy machine may not give it even one
        multiply()
        products += at_once
    return 2 * size**3 * products / spent


def estimated_seconds(flops: float, devices: int, rate: float) -> float:
    """Estimated seconds of ``flops`` on so many devices with a matmul ``rate`` in FLOP/s each."""
    return flops / (devices * rate * TYPICAL_SHARE)
