"""GPUs that a run can be planned for: memory and rates from the makers' data sheets, and the shares of them reached."""

from __future__ import annotations

from dataclasses import dataclass

from train.reporting.throughput import peak_flops

REACHED_PRODUCTS, REACHED_MEMORY = 0.65, 0.80
"""Shares of the data sheet's rates that matrix products and copies reach: assumed, from published runs on H100."""
OUTSIDE_TORCH = 1.5e9
"""Bytes of a GPU that the CUDA context, the libraries' workspaces and NCCL's buffers take: assumed."""
FRAGMENTATION = 0.03
"""Share of what tensors hold that the allocator takes beside them, with expandable segments: assumed."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet describes it."""

    name: str
    """As torch names it."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of its memory."""

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of matrix products in a precision."""
        peak = peak_flops(self.name, precision)
        assert peak is not None
        return peak


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 3.35e12),
    "h200": Gpu("NVIDIA H200", 141e9, 4.8e12),
    "gh200": Gpu("NVIDIA GH200 480GB", 96e9, 4.0e12),
    "b200": Gpu("NVIDIA B200", 180e9, 7.7e12),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 2.04e12),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 40e9, 1.555e12),
    "l40s": Gpu("NVIDIA L40S", 48e9, 0.864e12),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24e9, 1.008e12),
}
