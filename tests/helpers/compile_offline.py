"""Compiles kernels for a GPU that is not there, and says what each needs of it. Run where TRITON_INTERPRET is not set.

    python tests/helpers/compile_offline.py [--every-candidate] CASE ...

A case is a line of Python that calls an op, e.g. "ops.rms_norm(rand(4096, 4096), rand(4096), 1e-5)"; every kernel that its
forward and backward pass would launch is compiled for Hopper (sm_90) down to machine code. Prints a JSON line a launch: its case,
the kernel's name and constants, registers a thread, bytes spilled, bytes of shared memory, whether its products are Hopper's own
(wgmma).
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
    """Compiles ``kernel`` as a launch with these arguments would, and reads what the machine code needs."""
    settings = {k: options.pop(k) for k in LAUNCH_OPTIONS if k in options}
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind, key = (
            ("constexpr", value)
            if parameter.is_constexpr
            else native_specialize_impl(BaseBackend, value, False, True, True)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
        elif isinstance(key, str):
            attributes[(place,)] = BaseBackend.parse_attr(key)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=settings)
    shown = {k: v for k, v in options.items() if isinstance(v, bool | int)} | settings
    return {"kernel": kernel.__name__, "with": shown} | usage(compiled)


def usage(compiled: Any) -> dict[str, Any]:
    """Registers, spills and shared memory by cuobjdump; products by the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = dumped("--dump-resource-usage", file.name)
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        spilled = found["STACK"] + found["LOCAL"]
        in_loops = spilled_in_loops(dumped("-sass", file.name)) if spilled else 0
    ptx = compiled.asm["ptx"]
    return {
        "registers": found["REG"],
        "spilled": spilled,
        "spilled_in_loops": in_loops,
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
    }


def dumped(what: str, file: str) -> str:
    """What cuobjdump shows of a cubin."""
    return subprocess.run([CUOBJDUMP, what, file], capture_output=True, text=True, check=True).stdout


def spilled_in_loops(code: str) -> int:
    """How often the code's loops write a register to memory: what they only read was parked before them."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    back = [(int(to[1], 16), at) for at, text in lines if (to := re.match(r"@\S+ BRA.* 0x([0-9a-f]+)", text))]
    loops = [[text for at, text in lines if first <= at <= last] for first, last in back if first < last]
    return sum("STL" in text for loop in loops for text in loop)


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """An input that wants its gradient; its numbers are never read."""
    return torch.empty(*shape, dtype=dtype).requires_grad_()


def main(cases: list[str], every_candidate: bool) -> None:
    """Compiles what each case launches, each kernel once; with ``every_candidate`` for all tiles that the tuner may pick."""
    known: dict[str, dict[str, Any]] = {}
    for case in cases:

        def record(kernel: Any, *args: Any, case: str = case, **options: Any) -> None:
            types = [str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args]
            key = json.dumps([kernel.__name__, types, {k: str(v) for k, v in options.items()}])
            if key not in known:
                known[key] = compile_launch(kernel, *args, **options)
            print(json.dumps({"case": case, **known[key]}), flush=True)

        with launch.recording_launches(record), tuning.compiling_every_candidate() if every_candidate else contextlib.nullcontext():
            result = eval(case, {"ops": triton_ops, "kernels": kernels, "torch": torch, "rand": rand})
            outs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
            torch.autograd.backward(outs, [torch.empty_like(y) for y in outs])


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if a != "--every-candidate"], "--every-candidate" in sys.argv)
