"""Every kernel compiles for Hopper to machine code that fits: Triton's own compiler says so, on any machine (tests/helpers/compile_offline.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OFFLINE = Path(__file__).resolve().parents[1] / "helpers/compile_offline.py"
SHARED_BYTES = 227 << 10
REGISTERS = 64 << 10
SPILLED_BYTES = 16
"""A pair of registers moved out of a loop costs nothing; more is a tile that is too large."""
PARKED_BYTES = 128
"""So do those that wait, while a loop of matrix products has the registers, for what comes after it."""

CASES = {
    "attention": [
        # a layer of a Llama: grouped heads, packed documents, rotary embedding
        "ops.attention(rand(1, 4096, 8, 128), rand(1, 4096, 2, 128), rand(1, 4096, 2, 128), causal=True,"
        " segments=kernels.Segments(*[torch.ones(1, 4096)] * 2), rope=kernels.rope_table(torch.arange(4096)[None], 128, 1e4))",
        # and a token of its generation, over split keys
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
"""Their gradient goes through the kernel of their forward pass."""


def check(*options: str) -> dict[str, set[str]]:
    """Compiles every case in one process: each kernel must fit. The parts of the names of an op's kernels, by op."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(OFFLINE.parent.parent)
    cases = {case: op for op, cases in CASES.items() for case in cases}
    done = subprocess.run([sys.executable, OFFLINE, *options, *cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts: dict[str, set[str]] = {op: set() for op in CASES}
    for kernel in map(json.loads, done.stdout.splitlines()):
        parked = kernel["wgmma"] and not kernel["spilled_in_loops"]
        assert kernel["spilled"] <= (PARKED_BYTES if parked else SPILLED_BYTES), kernel
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["registers"] * 32 * kernel["with"]["num_warps"] <= REGISTERS, kernel
        parts[cases[kernel["case"]]] |= set(kernel["kernel"].split("_"))
    return parts


@pytest.mark.timeout(900)
def test_every_kernel_fits_a_hopper_gpu():
    for op, parts in check().items():
        assert ({op} if op in OWN_BACKWARD else {"forward", "backward"}) <= parts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_tile_that_the_tuner_may_pick_fits_a_hopper_gpu():
    assert all(check("--every-candidate").values())
