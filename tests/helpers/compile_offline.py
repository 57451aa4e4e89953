"""Compiles kernels for Hopper without a GPU and reports the resources of each.

TRITON_INTERPRET must not be set.

    python tests/helpers/compile_offline.py [--every-candidate] CASE ...

A case is a line of Python that calls an op, e.g. "ops.rms_norm(rand(4096, 4096), rand(4096), 1e-5)". Every kernel that
its forward and backward pass would launch is compiled for Hopper (sm_90) down to machine code. Prints a JSON line per
launch: the case, the kernel's name and constants, registers per thread, bytes spilled, bytes of shared memory, and
whether its matrix products are Hopper's (wgmma).
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels import launch, triton_ops, tuning

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


def compile_launch(kernel: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """Compiles ``kernel`` as a launch with these arguments would; returns its name, constants and resources."""
    launch_options = {k: options.pop(k) for k in LAUNCH_OPTIONS if k in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
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
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=launch_options
    )
    constants_shown = {k: v for k, v in options.items() if isinstance(v, bool | int)} | launch_options
    return {"kernel": kernel.__name__, "with": constants_shown} | usage(compiled)


def usage(compiled: Any) -> dict[str, Any]:
    """Resources of a compiled kernel: registers, spills and shared memory by cuobjdump, kinds of product by the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = cuobjdump("--dump-resource-usage", file.name)
        resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
        spilled = resources["STACK"] + resources["LOCAL"]
        in_loops = spilled_in_loops(cuobjdump("-sass", file.name)) if spilled else 0
    ptx = compiled.asm["ptx"]
    return {
        "registers": resources["REG"],
        "spilled": spilled,
        "spilled_in_loops": in_loops,
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
    }


def cuobjdump(option: str, file: str) -> str:
    """Output of cuobjdump with ``option`` for a cubin file."""
    return subprocess.run([CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


def spilled_in_loops(sass: str) -> int:
    """Number of instructions inside loops that spill a register to local memory, in the machine code ``sass``."""
    matches = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    instructions = [(int(address, 16), text) for address, text in matches]
    n_spills = 0
    for last, text in instructions:
        branch = re.match(r"@\S+ BRA.* 0x([0-9a-f]+)", text)
        first = int(branch[1], 16) if branch else last
        if first < last:  # a branch backwards closes a loop
            loop = [text for address, text in instructions if first <= address <= last]
            n_spills += sum("STL" in text for text in loop)
    return n_spills


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """An uninitialised input that requires its gradient; its numbers are never read."""
    return torch.empty(*shape, dtype=dtype).requires_grad_()


def main(cases: list[str], every_candidate: bool) -> None:
    """Compiles the launches of each case, each kernel once; with ``every_candidate`` for all candidate tiles."""
    compiled_launches: dict[str, dict[str, Any]] = {}
    for case in cases:

        def record(kernel: Any, *args: Any, case: str = case, **options: Any) -> None:
            types = [str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args]
            key = json.dumps([kernel.__name__, types, {k: str(v) for k, v in options.items()}])
            if key not in compiled_launches:
                compiled_launches[key] = compile_launch(kernel, *args, **options)
            print(json.dumps({"case": case, **compiled_launches[key]}), flush=True)

        tiles = tuning.compiling_every_candidate() if every_candidate else contextlib.nullcontext()
        with launch.recording_launches(record), tiles:
            result = eval(case, {"ops": triton_ops, "kernels": kernels, "torch": torch, "rand": rand})
            outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if a != "--every-candidate"], "--every-candidate" in sys.argv)
