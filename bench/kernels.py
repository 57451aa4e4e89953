"""Every op of ``kernels`` beside its peers, in one process, taking turns: time, rate, share of what this machine can do, memory.

    ./launch.sh bench kernels [--ops attention,rms_norm,...] [--quick] [--tune] [--without PEERS] [--minutes 8.5] [--out FILE]

The device's own rate of matrix products and of copies is measured first; a row's share is of those. Forward, backward and both,
medians of rounds in which everybody takes a turn. Then the goals, each a ratio of two rows of this run. All rows are appended to
bench/results/kernels.jsonl. On a GPU: bfloat16 at the goals' shapes. Without one: what ours runs there, torch's own path, in
float32 at small shapes, which says nothing of a GPU. ``--quick`` measures each op's first shape only; ``--tune`` measures tiles
first, which takes most of the minutes the first time on a machine. What the minutes do not suffice for is left out, and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernels
from bench.tools import goals, measure, peers, results
from bench.tools.cases import BACKWARD, BOTH, FAMILIES, FORWARD, OPS, OURS, Case, Function, Size
from bench.tools.memory import peak_bytes

Row = dict[str, Any]
SECONDS = 1.0
"""For the rounds of one mode of a case, beside what compiling takes."""
MODES = (FORWARD, BACKWARD, BOTH)


def thunk(function: Function, leaves: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    """One call of the function in this mode. A backward pass alone runs again and again over one forward pass."""
    if mode == FORWARD:
        return torch.no_grad()(lambda: function(*leaves))

    def outputs() -> list[Tensor]:
        found = function(*leaves)
        return [y for y in (found if isinstance(found, tuple) else (found,)) if y.requires_grad]

    made = outputs()
    gradients = [torch.ones((), device=y.device, dtype=y.dtype) if y.ndim == 0 else torch.randn_like(y) for y in made]
    if mode == BACKWARD:
        return functools.partial(torch.autograd.grad, made, leaves, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(outputs(), leaves, gradients)


def lazily(function: Function, leaves: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    """The same, but nothing runs before the first call, where a function that fails is told from one that is slow."""
    made: list[Callable[[], object]] = []

    def call() -> object:
        if not made:
            made.append(thunk(function, leaves, mode))
        return made[0]()

    return call


def measured(case: Case, size: Size, roof: measure.Roofline, seconds: float) -> Iterator[Row]:
    """The rows of a case, one a mode and function, with every round's time."""
    about = {"op": case.op, "shape": case.shape, "dtype": str(size.dtype).removeprefix("torch.")}
    for mode in (mode for mode in MODES if mode in case.work):
        thunks = {name: lazily(function, case.leaves, mode) for name, function in case.functions.items()}
        times, failed = measure.take_turns(thunks, size.device, seconds)
        for name in case.functions:
            row: Row = about | {"mode": mode, "variant": name}
            if name in failed:
                yield row | {"failed": failed[name]}
                continue
            found = times[name]
            rate = case.work[mode] / found.median * 1e3
            row |= {"ms": found.median, "rounds": found.device, "host_ms": min(found.host) if size.gpu else None}
            row |= {"unit": case.unit, "rate": rate, "share": rate / roof.of(case.unit)}
            yield row | ({"peak_bytes": peak_bytes(thunks[name], size.device)} if mode == BOTH else {})


def cases(size: Size, options: argparse.Namespace, end: float, skipped: list[str]) -> Iterator[Case]:
    """The cases that are asked for, without the peers that are not; from ``end`` on they are skipped."""
    for make, names in FAMILIES.values():
        for case in make(size) if set(names) & set(options.ops) else ():
            if case.op not in options.ops:
                continue
            if time.monotonic() > end:
                skipped.append(f"{case.op} {case.shape}")
                continue
            yield dataclasses.replace(
                case, functions={k: f for k, f in case.functions.items() if k not in options.without}
            )


def run(size: Size, options: argparse.Namespace, roof: measure.Roofline, end: float) -> tuple[list[Row], list[str]]:
    """The rows of all cases, and the cases for which no time was left."""
    rows: list[Row] = []
    skipped: list[str] = []
    for case in cases(size, options, end, skipped):
        rows += measured(case, size, roof, options.seconds)
        torch.compiler.reset()  # a compiled function is for one shape; the limit of recompilations is for all
    return rows, skipped


def tune(size: Size, options: argparse.Namespace, end: float) -> None:
    """Measures the tiles of every case that still has time; later runs find them on the disk."""
    with kernels.measuring_tiles():
        for case in cases(size, options, end, []):
            thunk(case.functions[OURS], case.leaves, BOTH)()


def tables(rows: list[Row]) -> Iterator[Table]:
    """A table an op."""
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        flops = any(row.get("unit") == "FLOP" for row in mine)
        table = Table(title=f"{op}, {mine[0]['dtype']}", title_justify="left")
        columns = (
            "shape",
            "mode",
            "",
            "ms",
            "range",
            "TFLOP/s" if flops else "GB/s",
            "% of roofline",
            "peak MB",
            "host ms",
        )
        for n, column in enumerate(columns):
            table.add_column(column, justify="left" if n < 3 else "right", no_wrap=n != 2)
        for row in mine:
            first = (row["shape"], row["mode"], row["variant"])
            if "failed" in row:
                table.add_row(*first, "-", f"[dim]{row['failed'][:60]}[/]")
                continue
            peak = f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else ""
            span = f"{min(row['rounds']):.3f}-{max(row['rounds']):.3f}"
            rate = row["rate"] / (1e12 if flops else 1e9)
            last = (f"{rate:,.1f}", f"{row['share']:.0%}", peak, f"{row['host_ms']:.3f}" if row["host_ms"] else "")
            table.add_row(*first, f"{row['ms']:.3f}", span, *last, style="bold" if row["variant"] == OURS else "")
        yield table


def names(text: str) -> list[str]:
    """Of "a,b"."""
    return text.split(",")


def main(arguments: list[str]) -> int:
    """Measures, prints the tables and the goals, keeps the rows. 0: whether goals are met is for the reader to see."""
    parser = argparse.ArgumentParser(prog="bench kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", type=names, default=OPS, help="some of: " + ", ".join(OPS))
    parser.add_argument("--quick", action="store_true", help="the first shape of each op")
    parser.add_argument(
        "--without", type=names, default=[], help=f"peers to leave out, such as '{peers.COMPILED},{peers.LIGER}'"
    )
    parser.add_argument("--tune", action="store_true", help="measure tiles first")
    gpu = torch.cuda.is_available()
    parser.add_argument("--minutes", type=float, default=8.5 if gpu else 2.5, help="after which nothing more is begun")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of rounds for each mode of a case")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "kernels.jsonl")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    began, out = time.monotonic(), Console(width=None if sys.stdout.isatty() else 150)
    end = began + 60 * options.minutes
    size = Size(torch.device("cuda" if gpu else "cpu"), options.quick)
    about = results.machine(size.device)
    out.print("  ".join(f"{key} {value}" for key, value in about.items() if value))
    if not size.gpu:
        out.print(
            "No GPU here: torch's path on the CPU, at small shapes. It says nothing of the Triton kernels' speed."
        )
    if not peers.can_compile() and peers.COMPILED not in options.without:
        out.print("No C++ compiler here: torch.compile is left out.")
    if size.gpu and peers.liger() is None:
        out.print("Liger-Kernel is not installed: its memory is given by its formula, its times are left out.")
    roof = measure.roofline(size.device, size.dtype)
    out.print(
        f"measured here: {roof.flops / 1e12:,.2f} TFLOP/s of {roof.dtype} products, {roof.bytes / 1e9:,.0f} GB/s of copies"
    )
    if options.tune and size.gpu:
        tune(size, options, began + 30 * options.minutes)
        out.print(f"tiles measured: {time.monotonic() - began:.0f} s")
    rows, skipped = run(size, options, roof, end)
    for table in tables(rows):
        out.print(table)
    out.print(goals.table(rows, size))
    if skipped:
        out.print(f"no time was left for: {'; '.join(skipped)}")
    roofs = {"matmul_flops": roof.flops, "copy_bytes": roof.bytes}
    results.append(options.out, [{"bench": "kernels"} | about | roofs | row for row in rows])
    out.print(f"{len(rows)} rows added to {options.out} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
