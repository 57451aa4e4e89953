"""One training step of a model on one device: its time, the share of the device's matmul rate
that it uses, where the time goes.

    ./launch.sh bench mfu [--models gpt2_124m,llama_1b] [--zero 1] [--overlap default] [--timers off] [--steps 20]
                          [--out FILE] [key=value ...]

bf16, one GPU: forward, backward, clipping and update by the engine that trains, on a batch of random tokens that stays
on the device. gpt2_124m takes 64 rows of 1024 tokens, llama_1b 16 of 2048. ``--zero``, ``--overlap`` and ``--timers``
take lists, such as ``--zero 0,1,2,3 --overlap off,on``: every combination is measured, one after the other. The timers
are DeepSpeed's of throughput, which wait for the device in every forward pass. Utilisation is the FLOPs that the model
needs (PaLM, appendix B; only the visible half of attention) over those that matrix products reached on this device just
before. "idle" is what is left of a step when no kernel runs on any stream: the device waits for the host. Without a GPU
gpt_tiny runs, to show that the measurement works, and nothing is idle. Rows are appended to bench/results/mfu.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import train.engine.engine as engine_module
from bench.tools import goals, results
from train.batch import Batch
from train.config import load as configuration
from train.config.schema import Config, ZeroConfig
from train.distributed import process_group
from train.engine.engine import Engine
from train.kernel_setup import choose_kernels
from train.reporting.throughput import matmul_rate, peak_flops, utilization
from train.run import build_engine

SHAPES = {"gpt2_124m": (64, 1024), "llama_1b": (16, 2048), "gpt_tiny": (8, 128)}
"""Rows per batch and tokens per row; other models take those of llama_1b."""
TOKENIZER = 50257
"""Vocabulary size for models that do not set one."""
WARM_UP, PROFILED = 3, 3
OVERLAPS = {"default": None, "off": False, "on": True}
HAS_OVERLAP = "overlap" in ZeroConfig.model_fields
SYNCHRONIZE = re.compile(r"cu(da)?(Device|Ctx|Stream|Event)Synchronize")
"""Calls of the driver in which the host waits for the device."""
PARTS = {
    "attention": r"attention|sdp|flash|fmha",
    "loss": r"cross_entropy|log_softmax|nll_loss|_scale_kernel",
    "norms": r"(layer|rms)_?norm",
    "matrix products": r"gemm|cutlass|nvjet|xmma|splitk|aten::(add)?mm|aten::bmm|aten::linear|mkldnn",
    "pointwise": r"gelu|gated_mlp|silu|rope|dropout",
}
"""Pattern of kernel names by part of a step; the first match counts, no match is "other". The update is "optimizer"."""


@dataclass(frozen=True)
class Rows:
    """Rows of a forward pass and passes per step, as an engine reads them from a loader."""

    micro: int
    micro_batches: int = 1


def random_batch(config: Config, vocabulary: int, device: torch.device) -> Batch:
    """A batch of random tokens on ``device``, each row one document."""
    shape = config.batch.global_, config.batch.seq_len
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(shape[1]).expand(shape)
    batch = {
        "tokens": tokens,
        "targets": tokens.roll(-1, 1),
        "positions": positions,
        "segments": torch.ones(shape).int(),
    }
    return {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True)
class Variant:
    """One way to make a step: the model, the ZeRO stage, overlap of communication, and DeepSpeed's own timers."""

    model: str
    zero: int
    overlap: str
    """A key of OVERLAPS."""
    timers: bool

    def settings(self, overrides: list[str]) -> Config:
        """The configuration of a step, with ``overrides``."""
        rows, length = SHAPES.get(self.model, SHAPES["llama_1b"])
        words = [f"model={self.model}", "precision=bf16", f"zero={self.zero}", "tracking=off"]
        words += [f"batch.global={rows}", f"batch.seq_len={length}"]
        if self.overlap != "default":
            words.append(f"zero.overlap={str(OVERLAPS[self.overlap]).lower()}")
        return configuration.load([*words, *overrides])

    @contextlib.contextmanager
    def with_timers(self) -> Iterator[None]:
        """Context in which an engine is built with DeepSpeed's timer of throughput on or off."""
        timers = {"timers": {"throughput": {"enabled": self.timers, "synchronized": True}}}
        usual = engine_module.deepspeed_config
        engine_module.deepspeed_config = lambda *arguments, **options: usual(*arguments, **options) | timers
        try:
            yield
        finally:
            engine_module.deepspeed_config = usual

    def __str__(self) -> str:
        overlap = "" if self.overlap == "default" else f", overlap {self.overlap}"
        return f"{self.model}, ZeRO {self.zero}{overlap}{', timers on' if self.timers else ''}"


def wait(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def times(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each step after warm-up."""
    elapsed_ms = []
    for _ in range(WARM_UP + steps):
        start_time = time.perf_counter()
        step()
        wait(device)
        elapsed_ms.append(1e3 * (time.perf_counter() - start_time))
    return elapsed_ms[WARM_UP:]


def parts(engine: Engine, step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by part, from profiled kernels on a GPU, from operators on a CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    part_ms: dict[str, float] = defaultdict(float)
    update = engine.engine.step
    for _ in range(PROFILED):
        passes, updating = profile(activities=activities), profile(activities=activities)

        def profiled_update(*arguments: Any, passes=passes, updating=updating, **options: Any) -> Any:
            wait(device)
            passes.stop()
            updating.start()
            try:
                return update(*arguments, **options)
            finally:
                wait(device)
                updating.stop()

        engine.engine.step = profiled_update
        passes.start()
        step()
        for name, milliseconds in durations(passes, device):
            part = next((p for p, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
            part_ms[part] += milliseconds / PROFILED
        part_ms["optimizer"] += sum(milliseconds for _, milliseconds in durations(updating, device)) / PROFILED
    engine.engine.step = update
    return dict(part_ms)


def durations(profiler: profile, device: torch.device) -> list[tuple[str, float]]:
    """(name, milliseconds) of each kernel; on a CPU, of each operator, its own time only."""
    if device.type == "cpu":
        return [(event.key, event.self_cpu_time_total / 1e3) for event in profiler.key_averages()]
    return [(event.name(), event.duration_ns() / 1e6) for event in device_events(profiler)]


def device_events(profiler: profile) -> list[Any]:
    """The kernels and copies that ran on the device."""
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
    return [event for event in events if not event.is_user_annotation()]


@dataclass(frozen=True)
class Busy:
    """Nanoseconds in which at least one of some intervals ran, and the longest time between two in which none did."""

    total: int
    longest_gap: int

    @classmethod
    def of(cls, intervals: Iterable[tuple[int, int]]) -> Busy:
        """From (start, end) of each interval, in any order, overlapping or not."""
        total = longest = 0
        end: int | None = None
        for start, stop in sorted(intervals):
            if end is not None and start > end:
                longest = max(longest, start - end)
            total += max(0, stop - max(start, end if end is not None else start))
            end = stop if end is None else max(end, stop)
        return cls(total, longest)


def host_gaps(step: Callable[[], object], device: torch.device, step_ms: float) -> dict[str, float | None]:
    """Milliseconds of a step that the device is busy and idle, its longest pause, and how often the host waits for it;
    None where kernels cannot be seen: on a CPU, or without CUPTI.

    Steps follow each other as in training. Idle is the time of an unprofiled step, ``step_ms``, less the busy one.
    """
    unknown: dict[str, float | None] = dict.fromkeys(("busy_ms", "idle_ms", "longest_gap_ms", "synchronizations"))
    if device.type == "cpu":
        return unknown
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
    ran = device_events(profiler)
    if not ran:  # a container without CUPTI
        return unknown
    busy = Busy.of((event.start_ns(), event.start_ns() + event.duration_ns()) for event in ran)
    starts = [event.start_ns() for event in ran]
    first, last = min(starts), max(starts)
    assert profiler.profiler is not None
    calls = [e for e in profiler.profiler.kineto_results.events() if SYNCHRONIZE.match(e.name())]
    waits = sum(first < call.start_ns() < last for call in calls)
    busy_ms = busy.total / 1e6 / PROFILED
    times_ms = {"busy_ms": busy_ms, "idle_ms": max(0.0, step_ms - busy_ms), "longest_gap_ms": busy.longest_gap / 1e6}
    return times_ms | {"synchronizations": waits / PROFILED}


def measure(variant: Variant, overrides: list[str], steps: int, world: process_group.DistContext) -> dict[str, Any]:
    """Measures one variant; returns its row for the results file."""
    gc.collect()  # frees the previous engine, which has reference cycles
    config = variant.settings(overrides)
    vocabulary = config.model.vocab_size or TOKENIZER
    batch = random_batch(config, vocabulary, world.device)
    with tempfile.TemporaryDirectory() as folder:  # where a run keeps what it has measured
        run = config.run.model_copy(update={"dir": folder})
        chosen = choose_kernels(config.model_copy(update={"run": run}), vocabulary, world, batch, print)
    with variant.with_timers():
        engine, objective = build_engine(config, vocabulary, world, Rows(config.batch.global_))
    tokens = batch["tokens"].numel()

    def step() -> None:
        engine.train_step([batch], {"loss": tokens}, config.optimizer.lr, lambda: None)

    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rate = matmul_rate(world.device, torch.bfloat16, 0.5)
    step_ms = times(step, steps, world.device)
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    median = statistics.median(step_ms)
    gaps = host_gaps(step, world.device, median)
    part_ms = parts(engine, step, world.device)
    if gaps["idle_ms"] is not None:
        part_ms["idle"] = gaps["idle_ms"]
    speed = tokens / median * 1e3
    flops = objective.flops_per_token(config.batch.seq_len)
    spec = peak_flops(torch.cuda.get_device_name(), "bf16") if world.device.type == "cuda" else None
    return {
        "kernels": chosen,
        "timers": engine.engine.tput_timer.config.enabled,
        "rows": config.batch.global_,
        "seq_len": config.batch.seq_len,
        "parameters": sum(shape.numel() for shape in engine.shapes.values()),
        "ms": median,
        "rounds": step_ms,
        "tokens_per_s": speed,
        "peak_bytes": peak,
        "matmul_flops": rate,
        "mfu": utilization(speed, flops, 1, rate),
        "mfu_spec": utilization(speed, flops, 1, spec),
        **gaps,
        "parts": part_ms,
    }


def report(out: Console, variant: Variant, row: dict[str, Any]) -> None:
    """Prints a row: times, utilisation, and a table of parts."""
    size = f"{row['parameters'] / 1e6:,.0f} M parameters, {row['rows']} x {row['seq_len']} tokens, bf16"
    out.print(f"\n[bold]{variant}[/]: {size}; kernels: {row['kernels']}")
    spread = f"{min(row['rounds']):.1f}-{max(row['rounds']):.1f}"
    peak = f", peak {row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
    out.print(f"{row['ms']:.1f} ms a step ({spread}), {row['tokens_per_s']:,.0f} tokens/s{peak}")
    spec = f", {row['mfu_spec']:.3f} of the data sheet's" if row["mfu_spec"] else ""
    reached = "reached" if row["mfu"] >= goals.MFU else "missed"
    rate = f"{row['matmul_flops'] / 1e12:,.2f} TFLOP/s"
    out.print(
        f"model FLOPs: {row['mfu']:.3f} of the {rate} that products reached here{spec} (goal: {goals.MFU}, {reached})"
    )
    if row["idle_ms"] is not None:
        waits = (
            f"longest pause {row['longest_gap_ms']:.2f} ms, the host waits {row['synchronizations']:.1f} times a step"
        )
        out.print(f"device idle {row['idle_ms']:.2f} ms a step, {waits}")
    table = Table()
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, milliseconds in sorted(row["parts"].items(), key=lambda item: -item[1]):
        table.add_row(part, f"{milliseconds:.2f}", f"{milliseconds / row['ms']:.0%}")
    out.print(table)


def choices(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for argparse: a comma-separated list of words out of ``known``."""
    words = list(known)

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(words):
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(words)}")
        return chosen

    return parse


def main(arguments: list[str]) -> int:
    """Measures each variant, prints its row and appends it. Returns 1 if one did not fit into memory, else 0."""
    parser = argparse.ArgumentParser(prog="bench mfu", description=(__doc__ or "").split("\n\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", default="gpt2_124m,llama_1b" if gpu else "gpt_tiny")
    parser.add_argument("--zero", type=choices("0123"), default=["1"], help="ZeRO stages")
    overlaps = OVERLAPS if HAS_OVERLAP else ["default"]
    parser.add_argument(
        "--overlap", type=choices(overlaps), default=["default"], help="some of: " + ", ".join(overlaps)
    )
    parser.add_argument("--timers", type=choices(["off", "on"]), default=["off"], help="DeepSpeed's: off, on or both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=results.FOLDER / "mfu.jsonl")
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    options = parser.parse_intermixed_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    out, code = Console(width=None if sys.stdout.isatty() else 150), 0
    world = process_group.init_group(0, 1, 0, "gpu" if gpu else "cpu", process_group.Rendezvous("127.0.0.1", 0))
    about = results.machine(world.device)
    out.print("  ".join(f"{key} {value}" for key, value in about.items() if value))
    if not gpu:
        out.print("No GPU here: a tiny model's steps on the CPU, which only show that the measurement works.")
    made = itertools.product(options.models.split(","), options.zero, options.overlap, options.timers)
    for model, zero, overlap, timers in made:
        variant = Variant(model, int(zero), overlap, timers == "on")
        row: dict[str, Any] = {"model": model, "zero": variant.zero, "overlap": OVERLAPS[overlap], "timers": None}
        row["overrides"] = options.overrides
        try:
            row |= measure(variant, options.overrides, options.steps, world)
            report(out, variant, row)
        except torch.OutOfMemoryError as error:
            code, row["failed"] = 1, f"out of GPU memory: {str(error).splitlines()[0]}"[:200]
            out.print(f"\n{variant}: {row['failed']}")
        results.append(options.out, [{"bench": "mfu"} | about | row])
    process_group.destroy_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
