"""Every kernel compiles for six architectures and fits the shared memory and registers of each.

Triton's own compiler does this on any machine, without a GPU (tests/helpers/compile_offline.py).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compile_cases, compile_offline

from kernels import requirements
from kernels.requirements import DeviceLimits
from kernels.triton_ops import rows
from kernels.triton_ops.attention import backward_bias, backward_kv, backward_q, forward
from kernels.triton_ops.attention.problem import TileChoice

ROOT = Path(__file__).resolve().parents[2]
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Architecture -> KiB that a block may have, by the table of compute capabilities in the CUDA C++ Programming Guide."""

REGISTERS = 64 << 10
TENSOR_MEMORY_COLUMNS = 512
SPILLED_BYTES = 16
"""Two pairs of registers cost nothing wherever they are spilled."""
PARKED_BYTES = 128
"""Limit for kernels that spill only outside their loops, to give these all registers."""

ATTENTION = {
    "_attention_forward_kernel": forward,
    "_attention_backward_q_kernel": backward_q,
    "_attention_backward_kv_kernel": backward_kv,
    "_attention_backward_bias_kernel": backward_bias,
}


def compiled_rows(archs: str, *arguments: str) -> list[dict[str, Any]]:
    """What the command prints, from a process where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-m", "helpers.compile_offline", "--arch", archs, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(row: dict[str, Any]) -> None:
    """A compiled kernel is within the limits of its architecture, spills in no loop, and takes what its table says."""
    assert row["shared"] <= SHARED_KIB[row["arch"]] << 10, row
    assert row["registers"] * row["threads"] <= REGISTERS, row
    assert row["tensor_memory"] <= TENSOR_MEMORY_COLUMNS, row
    if row["arch"] in (80, 90, 100) and not may_spill(row):
        allowed = SPILLED_BYTES if row["spilled_in_loops"] else PARKED_BYTES
        assert row["spilled"] <= allowed, row
    if row["kernel"] in ATTENTION:
        kib = declared_kib(row)
        assert kib is not None, row
        assert row["shared"] <= (kib << 10) + bias_bytes(row), row


def may_spill(row: dict[str, Any]) -> bool:
    """Heads of 256 in float32 and the widest rows, too much for a thread's registers whatever the tile."""
    is_wide = row["kernel"] in ATTENTION and row["with"]["BLOCK_D"] == 256
    is_widest_row = row["kernel"] == "_layer_norm_backward_kernel" and row["with"]["num_warps"] == 32
    return is_widest_row or (is_wide and row["dtype"] == "float32")


def declared_kib(row: dict[str, Any]) -> int | None:
    """Shared memory by the candidates' own table, for the tiles and the architecture of a compiled kernel."""
    tiles = row["with"]
    module, n_queries = ATTENTION[row["kernel"]], 1 if tiles["BLOCK_M"] == 16 else 4096
    q = torch.empty(1, n_queries, 1, tiles["HEAD_DIM"], dtype=getattr(torch, row["dtype"]), device="meta")
    long = q.new_empty(1, 4096, 1, tiles["HEAD_DIM"])
    names = "BLOCK_M", "BLOCK_N", "USE_TMA", "num_warps", "num_stages", "WARP_SPECIALIZE"
    wanted = {name: tiles[name] for name in names if name in tiles}
    products, biased = DeviceLimits(divmod(row["arch"], 10), 0).products, "bias=" in row["case"]
    for choice in (*module._tile_choices(q, biased), *module._tile_choices(long, biased)):
        if {name: value for name, value in choice.tiles().items() if name in tiles} == wanted:
            return getattr(choice, products)
    return None


def bias_bytes(row: dict[str, Any]) -> int:
    """The most that the tiles of a bias add, which the forward pass and dQ and dK read in their loops."""
    if "bias=" not in row["case"]:
        return 0
    tiles = row["with"]
    return tiles["num_stages"] * tiles["BLOCK_M"] * tiles["BLOCK_N"] * (4 if row["dtype"] == "float32" else 2)


@pytest.mark.timeout(900)
def test_every_kernel_that_auto_chooses_fits_a_gpu_of_each_kind():
    """One architecture for each kind of matrix product and each size of shared memory."""
    compiled_launches = compiled_rows("86,90,100")
    for row in compiled_launches:
        assert_fits(row)
    compiled = {(row["arch"], row["kernel"]) for row in compiled_launches}
    names = {kernel for _, kernel in compiled}
    assert names == kernel_names()
    assert compiled == set(itertools.product((86, 90, 100), names))
    assert set(compile_offline.table(compiled_launches).splitlines()) <= set(documented_table()), (
        "docs/kernels.md is out of date"
    )


def test_documented_table_has_a_row_for_each_kernel_and_architecture():
    cells = [re.match(r"\| `(\w+)` \| (\d+) \|", line) for line in documented_table()[2:]]
    documented = [(f"_{cell[1]}_kernel", int(cell[2])) for cell in cells if cell]
    assert documented == sorted(itertools.product(kernel_names(), SHARED_KIB))


def documented_table() -> list[str]:
    """Lines of the table of compiled kernels in docs/kernels.md."""
    lines = (ROOT / "docs/kernels.md").read_text().splitlines()
    first = lines.index(compile_offline.TABLE_HEAD[0])
    return list(itertools.takewhile(str.strip, lines[first:]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "cases", [compile_cases.EVERY_ATTENTION, compile_cases.EVERY_ROW_WISE], ids=["attention", "rows"]
)
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_every_tile_candidate_fits_every_architecture(arch, cases):
    """Takes two idle cores two to ten minutes a case, by the time that parts of it took."""
    for row in compiled_rows(str(arch), "--every-candidate", *cases):
        assert_fits(row)


def kernel_names() -> set[str]:
    """Names of all kernels in the source text."""
    names: set[str] = set()
    for file in (ROOT / "kernels/triton_ops").rglob("*.py"):
        names |= set(re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE))
    return names


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("module", ATTENTION.values(), ids=lambda m: m.__name__.rpartition(".")[2])
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_every_dtype_and_head_dim_has_tiles_that_fit(module, arch):
    limits = DeviceLimits(divmod(arch, 10), SHARED_KIB[arch] << 10)
    for dtype, head_dim, n_queries in itertools.product(DTYPES, (1, 48, 64, 65, 128, 256), (1, 4096)):
        q = torch.empty(1, n_queries, 1, head_dim, dtype=dtype, device="meta")
        for bias in (0, dtype.itemsize):
            choices = module._tile_choices(q, bool(bias))
            assert any(c.fits(limits, bias) for c in choices), (dtype, head_dim, n_queries, bias)


@pytest.mark.parametrize(
    ("capability", "shared_kib", "use_tma", "bias", "fits"),
    [
        ((8, 0), 163, 0, 0, True),
        ((8, 6), 99, 0, 0, True),
        ((8, 6), 99, 0, 4, False),  # two stages of 64 x 32 elements are 16 KiB more
        ((8, 6), 99, 0, 2, True),
        ((8, 0), 163, 1, 0, False),  # no descriptors before Hopper
        ((9, 0), 227, 1, 0, True),
        ((9, 0), 128, 0, 0, False),
        ((10, 0), 227, 0, 0, False),  # None: not for these products
        ((12, 0), 99, 1, 0, True),
    ],
)
def test_candidates_are_held_against_the_limits_of_the_device(capability, shared_kib, use_tma, bias, fits):
    choice = TileChoice(64, 32, use_tma, 4, 2, mma=90, wgmma=129, tcgen05=None)
    assert choice.fits(DeviceLimits(capability, shared_kib << 10), bias) == fits


@pytest.mark.parametrize("branch", ["@!P0 BRA 0x0010", "BRA 0x0010", "@P1 BRA.DIV UR4, 0x0010"])
def test_spills_are_counted_inside_loops_only(branch):
    code = ["STL [R1], R0", "FADD R0, R0, R1", "STL [R1+0x4], R2", branch, "STL [R1+0x8], R3", "EXIT", "BRA 0x0060"]
    lines = [f"/*{16 * n:04x}*/    {text} ;" for n, text in enumerate(code)]
    assert compile_offline.spilled_in_loops("\n".join(lines)) == 1


@pytest.mark.parametrize(("shared_kib", "depths"), [(99, {1}), (163, {1}), (227, {1, 2})])
def test_norms_prefetch_no_deeper_than_shared_memory(shared_kib, depths):
    """Three inputs of 8192 float32 numbers are 96 KiB a block, and the sums of a row some bytes more."""
    with requirements.assuming_limits(DeviceLimits((9, 0), shared_kib << 10)):
        assert {tiles["STAGES"] for tiles in rows.backward_tiles(torch.empty(1, 8192))} == depths


def test_the_interpreter_runs_any_candidate():
    assert TileChoice(64, 32, 1, 4, 2, None, None, None).fits(None, 4)
