"""Settings under which two runs on the same GPUs are equal bit for bit: ``cluster.deterministic``. Imports no torch."""

from __future__ import annotations

NCCL = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple", "NCCL_NVLS_ENABLE": "0"}
"""One order of sums in every collective: NCCL else chooses by size and load, and NVLink's switch adds in any order."""
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Workspaces of their own for cuBLAS' streams, without which it chooses among kernels as memory happens to be free."""


def environment(deterministic: bool) -> dict[str, str]:
    """Variables that a worker needs before it meets NCCL or cuBLAS; they replace the user's own."""
    return NCCL | CUBLAS if deterministic else {}


def apply(deterministic: bool) -> None:
    """Have torch take deterministic kernels in this process, and refuse operations that have none."""
    import torch  # the driver asks for the environment, and loads no torch

    torch.use_deterministic_algorithms(deterministic)
