"""Compiles kernels for GPUs that are not here and reports the resources of each.

TRITON_INTERPRET must not be set.

    PYTHONPATH=.:tests python -m helpers.compile_offline [--arch 80,90] [--every-candidate] [--table] [CASE ...]

A case is a line of Python that calls an op, e.g. "ops.rms_norm(rand(4096, 4096), rand(4096), 1e-5)"; without any, the
cases of ``compile_cases.SOME`` are taken. Every kernel that the forward and backward pass would launch on each
architecture is compiled down to machine code. Prints a JSON line per launch: the case, the architecture, the kernel's
name, dtype and constants, threads, registers of each, bytes spilled and spills inside loops, bytes of shared memory,
columns of tensor memory, and the instruction of its matrix products; with --table the table of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import operator
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from helpers import compile_cases
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels import launch, requirements, triton_ops, tuning
from kernels.requirements import DeviceLimits

LIMITS = {
    80: DeviceLimits((8, 0), 163 << 10),
    86: DeviceLimits((8, 6), 99 << 10),
    89: DeviceLimits((8, 9), 99 << 10),
    90: DeviceLimits((9, 0), 227 << 10),
    100: DeviceLimits((10, 0), 227 << 10),
    120: DeviceLimits((12, 0), 99 << 10),
}
"""Architecture -> its limits, by the table of compute capabilities in NVIDIA's CUDA C++ Programming Guide."""

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


def compile_launch(arch: int, kernel: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """Compiles ``kernel`` as a launch with these arguments would; returns its name, constants and resources."""
    launch_options = {k: options.pop(k) for k in LAUNCH_OPTIONS if k in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        kind, key = (
            ("constexpr", value)
            if parameter.is_constexpr
            else native_specialize_impl(BaseBackend, value, False, True, True)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif isinstance(key, str):
            attributes[(index,)] = BaseBackend.parse_attr(key)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch_options)
    constants_shown = {k: v for k, v in options.items() if isinstance(v, bool | int)} | launch_options
    dtype = str(next(a.dtype for a in args if isinstance(a, torch.Tensor))).removeprefix("torch.")
    return {"arch": arch, "kernel": kernel.__name__, "dtype": dtype, "with": constants_shown} | usage(compiled)


def usage(compiled: Any) -> dict[str, Any]:
    """Resources of a compiled kernel: registers, spills and shared memory by cuobjdump, kinds of product by the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = cuobjdump("--dump-resource-usage", file.name)
        resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
        spilled = resources["STACK"] + resources["LOCAL"]
        in_loops = spilled_in_loops(cuobjdump("-sass", file.name)) if spilled else 0
    [threads] = re.findall(r"\.reqntid (\d+)", compiled.asm["ptx"])
    products = [name for name in ("wgmma", "tcgen05", "mma") if f"{name}." in compiled.asm["ptx"]]
    return {
        "threads": int(threads),
        "registers": resources["REG"],
        "spilled": spilled,
        "spilled_in_loops": in_loops,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "products": products[0] if products else None,
    }


def cuobjdump(option: str, file: str) -> str:
    """Output of cuobjdump with ``option`` for a cubin file."""
    return subprocess.run([CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


def spilled_in_loops(sass: str) -> int:
    """Number of instructions inside loops that spill a register to local memory, in the machine code ``sass``."""
    instructions = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    spills = {address for address, text in instructions if "STL" in text}
    in_loops: set[int] = set()
    for last, text in instructions:
        branch = re.match(r"(?:@\S+ )?BRA.* 0x([0-9a-f]+)", text)
        first = int(branch[1], 16) if branch else last
        if first < last:  # a branch backwards closes a loop
            in_loops |= {address for address in spills if first <= address <= last}
    return len(in_loops)


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """An uninitialised input that requires its gradient; its numbers are never read."""
    return torch.empty(*shape, dtype=dtype).requires_grad_()


def launches(case: str, arch: int, every_candidate: bool) -> list[tuple[Any, ...]]:
    """(kernel, arguments, options) of each launch of the case's forward and backward pass on a GPU of ``arch``."""
    found: list[tuple[Any, ...]] = []
    tiles = tuning.compiling_every_candidate() if every_candidate else contextlib.nullcontext()
    recording = launch.recording_launches(lambda kernel, *args, **options: found.append((kernel, args, options)))
    with requirements.assuming_limits(LIMITS[arch]), recording, tiles:
        result = eval(case, {"ops": triton_ops, "kernels": kernels, "torch": torch, "rand": rand})
        outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return found


def identity(arch: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Equal for launches that compile to the same code."""
    types = [str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args]
    return json.dumps([arch, kernel.__name__, types, {k: str(v) for k, v in options.items()}])


_to_compile: list[tuple[Any, ...]] = []
"""Distinct launches, read by the forked processes: neither kernels nor tensor descriptors can be pickled."""


def compile_nth(n: int) -> dict[str, Any]:
    """Compiles the n-th of the distinct launches."""
    arch, kernel, args, options = _to_compile[n]
    return compile_launch(arch, kernel, *args, **options)


def compile_cases_for(
    cases: Sequence[str], archs: Sequence[int], every_candidate: bool, jobs: int
) -> list[dict[str, Any]]:
    """Compiles the launches of each case for each architecture, equal ones once; returns a row for each launch."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    numbers: dict[str, int] = {}
    rows = []
    for arch, case in itertools.product(archs, cases):
        for kernel, args, options in launches(case, arch, every_candidate):
            key = identity(arch, kernel, args, options)
            if key not in numbers:
                numbers[key] = len(_to_compile)
                _to_compile.append((arch, kernel, args, options))
            rows.append((case, numbers[key]))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        compiled = pool.map(compile_nth, range(len(_to_compile)), chunksize=1)
    return [{"case": case, **compiled[number]} for case, number in rows]


TABLE_HEAD = (
    "| Kernel | sm | Shared memory: fp32, bf16, limit (KiB) | Registers | Bytes spilled | Spills in loops |",
    "|---|---|---|---|---|---|",
)


def table(rows: list[dict[str, Any]]) -> str:
    """The most that a kernel takes in any of ``rows``, as Markdown: a line for each kernel and architecture."""
    lines = list(TABLE_HEAD)
    key = operator.itemgetter("kernel", "arch")
    for (kernel, arch), group in itertools.groupby(sorted(rows, key=key), key):
        same = list(group)
        kib = [f"{largest(same, 'shared', dtype) / 1024:.1f}" for dtype in ("float32", "bfloat16")]
        numbers = [str(largest(same, name)) for name in ("registers", "spilled", "spilled_in_loops")]
        limit, name = LIMITS[arch].shared_bytes >> 10, kernel.strip("_").removesuffix("_kernel")
        lines.append(f"| `{name}` | {arch} | {kib[0]}, {kib[1]}, {limit} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def largest(rows: list[dict[str, Any]], name: str, dtype: str | None = None) -> int:
    """The largest number called ``name`` in ``rows`` of a dtype, or of all; 0 without any."""
    return max((row[name] for row in rows if dtype in (None, row["dtype"])), default=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--arch", default="90", help="comma-separated, of " + ", ".join(map(str, LIMITS)))
    parser.add_argument("--every-candidate", action="store_true", help="all tiles that the tuner may choose")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--table", action="store_true", help="print the table of docs/kernels.md")
    options = parser.parse_args()
    archs = [int(a) for a in options.arch.split(",")]
    compiled_rows = compile_cases_for(options.cases or compile_cases.SOME, archs, options.every_candidate, options.jobs)
    print(table(compiled_rows) if options.table else "\n".join(map(json.dumps, compiled_rows)))
