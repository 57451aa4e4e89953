"""Every kernel compiles for Hopper and fits its registers and shared memory.

Triton's own compiler does this on any machine, without a GPU (tests/helpers/compile_offline.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "tests/helpers/compile_offline.py"
SHARED_BYTES = 227 << 10
REGISTERS = 64 << 10
SPILLED_BYTES = 16
"""A pair of registers spilled outside a loop costs nothing; more means that a tile is too large."""
PARKED_BYTES = 128
"""Limit for kernels that spill only outside their loop of matrix products, to give that loop all registers."""

CASES = {
    "attention": [
        # a layer of Llama: grouped heads, packed documents, rotary embedding
        "ops.attention(rand(1, 4096, 8, 128), rand(1, 4096, 2, 128), rand(1, 4096, 2, 128), causal=True,"
        " segments=kernels.Segments(*[torch.ones(1, 4096)] * 2),"
        " rope=kernels.rope_table(torch.arange(4096)[None], 128, 1e4))",
        # decoding of one token, over split keys
        "ops.attention(rand(1, 1, 8, 128), rand(1, 4096, 2, 128), rand(1, 4096, 2, 128), causal=True)",
    ],
    "rms_norm": [f"ops.rms_norm(rand(64, {width}), rand({width}), 1e-5)" for width in (768, 4096, 16384)],
    "layer_norm": [
        *(f"ops.layer_norm(rand(64, {width}), rand({width}), rand({width}), 1e-5)" for width in (768, 4096, 8192)),
        "ops.layer_norm(rand(64, 16384), rand(16384), None, 1e-5)",
    ],
    "add_layer_norm": [
        "ops.add_layer_norm(rand(64, 4096), rand(64, 4096), rand(4096), rand(4096), 1e-5)",
        "ops.add_layer_norm(rand(64, 4096), rand(64, 4096), rand(4096), rand(4096), 1e-5, kernels.Dropout(0.1, 7))",
    ],
    "bias_gelu": ["ops.bias_gelu(rand(64, 3072), rand(3072))"],
    "gated_mlp": [
        f"ops.gated_mlp(*rand(64, 2 * 11008).chunk(2, -1), '{activation}')" for activation in ("silu", "gelu")
    ],
    "rope": [
        f"ops.rope(rand(2, 8, 48, {head})[:, :, :32], kernels.rope_table(torch.arange(8)[None], {head}, 1e4))"
        for head in (64, 96, 128)
    ],
    "dropout": ["ops.dropout(rand(64, 768), kernels.Dropout(0.1, 7))"],
    "add_rms_norm": [
        "ops.add_rms_norm(rand(64, 4096), rand(64, 4096), rand(4096), 1e-5)",
        "ops.add_rms_norm(rand(64, 4096), rand(64, 4096), rand(4096), 1e-5, kernels.Dropout(0.1, 7))",
    ],
    "cross_entropy": [
        "ops.cross_entropy(rand(64, 128256), torch.zeros(64, dtype=torch.int64), label_smoothing=0.1, z_loss=1e-4)",
        "ops.cross_entropy_with_grad(rand(64, 50304), torch.zeros(64, dtype=torch.int64), -100, 0.0, 0.0, True)",
        "ops.cross_entropy_with_grad(rand(64, 257), torch.zeros(64, dtype=torch.int64), -100, 0.0, 0.0, True)",
        "ops.scale_(rand(64, 4096), torch.zeros(())) or rand(1)",
    ],
}


OWN_BACKWARD = ("rope", "dropout")
"""Ops whose gradient runs the same kernel as their forward pass."""


def compile_and_check(*options: str) -> dict[str, set[str]]:
    """Compiles every case and asserts that each kernel fits; returns the parts of the kernels' names by op."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    op_of_case: dict[str, str] = {}
    for op, cases in CASES.items():
        op_of_case |= dict.fromkeys(cases, op)
    command = [sys.executable, OFFLINE, *options, *op_of_case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts: dict[str, set[str]] = {op: set() for op in CASES}
    for kernel in map(json.loads, done.stdout.splitlines()):
        parked = kernel["wgmma"] and not kernel["spilled_in_loops"]
        assert kernel["spilled"] <= (PARKED_BYTES if parked else SPILLED_BYTES), kernel
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["registers"] * 32 * kernel["with"]["num_warps"] <= REGISTERS, kernel
        parts[op_of_case[kernel["case"]]] |= set(kernel["kernel"].split("_"))
    return parts


@pytest.mark.timeout(900)
def test_every_kernel_compiled_for_hopper_fits():
    for op, parts in compile_and_check().items():
        assert ({op} if op in OWN_BACKWARD else {"forward", "backward"}) <= parts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_tile_candidate_compiled_for_hopper_fits():
    assert all(compile_and_check("--every-candidate").values())
