"""Every op of ``kernels`` beside its peers, in one process, taking turns: time, rate, share of
what this machine can do, memory.

    ./launch.sh bench kernels [--ops attention,rms_norm,...] [--quick] [--tune|--tiles] [--without PEERS]
                              [--minutes 8.5] [--out FILE]

The device's own rates of matrix products and of copies are measured first; a row's share is of those. Forward, backward
and both are timed, as medians of rounds in which every function takes a turn. Then come the goals, each a ratio of two
rows of this run. All rows are appended to bench/results/kernels.jsonl. On a GPU the inputs are bfloat16 at the shapes
of the goals. Without one, our ops run on torch in float32 at small shapes, which says nothing of a GPU. ``--quick``
measures only the first shape of each op; ``--tune`` measures tiles first, which takes most of the minutes the first
time on a machine, and ``--tiles`` nothing else. The families of ops take turns, a case at a time, so that little time
gives something of each. Cases for which no time is left are skipped and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
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
"""Time for the rounds of one mode of a case, without compilation."""
MODES = (FORWARD, BACKWARD, BOTH)


def make_call(function: Function, leaves: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    """Returns a call of the function in this mode; a backward pass alone repeats over one forward pass."""
    if mode == FORWARD:
        return torch.no_grad()(lambda: function(*leaves))

    def outputs() -> list[Tensor]:
        result = function(*leaves)
        return [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]

    outs = outputs()
    gradients = [torch.ones((), device=y.device, dtype=y.dtype) if y.ndim == 0 else torch.randn_like(y) for y in outs]
    if mode == BACKWARD:
        return functools.partial(torch.autograd.grad, outs, leaves, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(outputs(), leaves, gradients)


def make_lazy_call(function: Function, leaves: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    """As ``make_call``, but nothing runs before the first call, which reports a function that fails."""
    calls: list[Callable[[], object]] = []

    def call() -> object:
        if not calls:
            calls.append(make_call(function, leaves, mode))
        return calls[0]()

    return call


def measure_case(case: Case, size: Size, roofline: measure.Roofline, seconds: float) -> Iterator[Row]:
    """Yields the rows of a case, one per mode and function, with the time of every round."""
    context = {"op": case.op, "shape": case.shape, "dtype": str(size.dtype).removeprefix("torch.")}
    for mode in (mode for mode in MODES if mode in case.work):
        thunks = {name: make_lazy_call(function, case.leaves, mode) for name, function in case.functions.items()}
        times, failed = measure.time_in_turns(thunks, size.device, seconds)
        for name in case.functions:
            row: Row = context | {"mode": mode, "variant": name}
            if name in failed:
                yield row | {"failed": failed[name]}
                continue
            case_times = times[name]
            rate = case.work[mode] / case_times.median * 1e3
            host_ms = min(case_times.host) if size.gpu else None
            row |= {"ms": case_times.median, "rounds": case_times.device, "host_ms": host_ms}
            row |= {"unit": case.unit, "rate": rate, "share": rate / roofline.of(case.unit)}
            yield row | ({"peak_bytes": peak_bytes(thunks[name], size.device)} if mode == BOTH else {})


def cases(size: Size, options: argparse.Namespace, deadline: float, skipped: list[str]) -> Iterator[Case]:
    """Yields the requested cases and peers; from ``deadline`` on, cases go to ``skipped``."""
    families = [make(size) for make, names in FAMILIES.values() if set(names) & set(options.ops)]
    for case in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*families))):
        if case.op not in options.ops:
            continue
        if time.monotonic() > deadline:
            skipped.append(f"{case.op} {case.shape}")
            continue
        yield dataclasses.replace(case, functions={k: f for k, f in case.functions.items() if k not in options.without})


def run(
    size: Size, options: argparse.Namespace, roofline: measure.Roofline, deadline: float, keep: Callable[[Row], None]
) -> tuple[list[Row], list[str]]:
    """Returns the rows of all cases, each given to ``keep`` at once, and the cases for which no time was left."""
    rows: list[Row] = []
    skipped: list[str] = []
    for case in cases(size, options, deadline, skipped):
        for row in measure_case(case, size, roofline, options.seconds):
            keep(row)
            rows.append(row)
        torch.compiler.reset()  # compiled functions are for one shape, but the recompile limit counts all
    return rows, skipped


def tune(size: Size, options: argparse.Namespace, deadline: float) -> Row:
    """Measures the tiles of every case before ``deadline``; later runs find them on disk. Returns a row about it."""
    start_time, skipped, tuned = time.monotonic(), [], 0
    with kernels.measuring_tiles():
        for case in cases(size, options, deadline, skipped):
            make_call(case.functions[OURS], case.leaves, BOTH)()
            tuned += 1
    return {"tuned": tuned, "skipped": skipped, "seconds": time.monotonic() - start_time}


def tables(rows: list[Row]) -> Iterator[Table]:
    """Yields a console table per op."""
    for op in dict.fromkeys(row["op"] for row in rows):
        op_rows = [row for row in rows if row["op"] == op]
        flops = any(row.get("unit") == "FLOP" for row in op_rows)
        table = Table(title=f"{op}, {op_rows[0]['dtype']}", title_justify="left")
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
        for row in op_rows:
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
    """Splits a comma-separated list of names."""
    return text.split(",")


def main(arguments: list[str]) -> int:
    """Measures, prints tables and goals, appends the rows. Returns 0 whether or not the goals are met."""
    parser = argparse.ArgumentParser(prog="bench kernels", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ops", type=names, default=OPS, help="some of: " + ", ".join(OPS))
    parser.add_argument("--quick", action="store_true", help="the first shape of each op")
    parser.add_argument(
        "--without", type=names, default=[], help=f"peers to leave out, such as '{peers.COMPILED},{peers.LIGER}'"
    )
    parser.add_argument("--tune", action="store_true", help="measure tiles first, for at most half of the minutes")
    parser.add_argument("--tiles", action="store_true", help="measure tiles and nothing else")
    gpu = torch.cuda.is_available()
    parser.add_argument("--minutes", type=float, default=8.5 if gpu else 2.5, help="after which nothing more is begun")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of rounds for each mode of a case")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "kernels.jsonl")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    start_time, out = time.monotonic(), Console(width=None if sys.stdout.isatty() else 150)
    deadline = start_time + 60 * options.minutes
    size = Size(torch.device("cuda" if gpu else "cpu"), options.quick)
    context = {"bench": "kernels"} | results.machine(size.device)
    out.print("  ".join(f"{key} {value}" for key, value in context.items() if value))
    for line in left_out(size, options):
        out.print(line)
    if options.tiles or (options.tune and size.gpu):
        row = tune(size, options, deadline if options.tiles else start_time + 30 * options.minutes)
        out.print(f"tiles of {row['tuned']} cases, {row['seconds']:.0f} s; no time for {len(row['skipped'])}")
        results.append(options.out, [context | row])
        if options.tiles:
            return 0
    roofline = measure.roofline(size.device, size.dtype)
    out.print(
        f"measured here: {roofline.flops / 1e12:,.2f} TFLOP/s of {roofline.dtype} products, "
        f"{roofline.bytes / 1e9:,.0f} GB/s of copies"
    )
    context |= {"matmul_flops": roofline.flops, "copy_bytes": roofline.bytes}
    rows, skipped = run(size, options, roofline, deadline, lambda row: results.append(options.out, [context | row]))
    for table in tables(rows):
        out.print(table)
    out.print(goals.table(rows, size))
    if skipped:
        out.print(f"no time was left for: {'; '.join(skipped)}")
    out.print(f"{len(rows)} rows added to {options.out} in {time.monotonic() - start_time:.0f} s")
    return 0


def left_out(size: Size, options: argparse.Namespace) -> Iterator[str]:
    """Yields a line about each thing that cannot be measured here."""
    if not size.gpu:
        yield "No GPU here: torch's path on the CPU, at small shapes. It says nothing of the Triton kernels' speed."
    if not peers.can_compile() and peers.COMPILED not in options.without:
        yield "No C++ compiler here: torch.compile is left out."
    if size.gpu and peers.liger() is None:
        yield "Liger-Kernel is not installed: its memory is given by its formula, its times are left out."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
