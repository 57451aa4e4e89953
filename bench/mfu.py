"""One training step of a model on one device: its time, the share of the device's matmul rate
that it uses, where the time goes.

    ./launch.sh bench mfu [--models gpt2_124m,llama_1b] [--steps 20] [--out FILE] [key=value ...]

bf16, ZeRO 1, one GPU: forward, backward, clipping and update by the engine that trains, on a batch of random tokens
that stays on the device. gpt2_124m takes 64 rows of 1024 tokens, llama_1b 16 of 2048. Utilisation is the FLOPs that the
model needs (PaLM, appendix B; only the visible half of attention) over those that matrix products reached on this
device just before. Without a GPU gpt_tiny runs, to show that the measurement works. Rows are appended to
bench/results/mfu.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.tools import results
from train.batch import Batch
from train.config import load as configuration
from train.config.schema import Config
from train.distributed import process_group
from train.engine.engine import Engine
from train.kernel_setup import choose_kernels
from train.reporting.throughput import matmul_rate, peak_flops, utilization
from train.run import build_engine

GOAL = 0.50
SHAPES = {"gpt2_124m": (64, 1024), "llama_1b": (16, 2048), "gpt_tiny": (8, 128)}
"""Rows per batch and tokens per row; other models take those of llama_1b."""
TOKENIZER = 50257
"""Vocabulary size for models that do not set one."""
WARM_UP, PROFILED = 3, 3
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


def settings(model: str, overrides: list[str]) -> Config:
    """Configuration of a benchmark step of ``model``, with ``overrides``."""
    rows, length = SHAPES.get(model, SHAPES["llama_1b"])
    shape = [f"batch.global={rows}", f"batch.seq_len={length}"]
    return configuration.load([f"model={model}", "precision=bf16", "zero=1", "tracking=off", *shape, *overrides])


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
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
    return [(e.name(), e.duration_ns() / 1e6) for e in events if not e.is_user_annotation()]


def measure(model: str, overrides: list[str], steps: int, world: process_group.DistContext) -> dict[str, Any]:
    """Measures one model; returns its row for the results file."""
    gc.collect()  # frees the previous engine, which has reference cycles
    config = settings(model, overrides)
    vocabulary = config.model.vocab_size or TOKENIZER
    batch = random_batch(config, vocabulary, world.device)
    chosen = choose_kernels(config, vocabulary, world, batch)
    engine, objective = build_engine(config, vocabulary, world, Rows(config.batch.global_))
    tokens = batch["tokens"].numel()

    def step() -> None:
        engine.train_step([batch], {"loss": tokens}, config.optimizer.lr, lambda: None)

    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rate = matmul_rate(world.device, torch.bfloat16, 0.5)
    step_ms = times(step, steps, world.device)
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    part_ms = parts(engine, step, world.device)
    median = statistics.median(step_ms)
    speed = tokens / median * 1e3
    flops = objective.flops_per_token(config.batch.seq_len)
    spec = peak_flops(torch.cuda.get_device_name(), "bf16") if world.device.type == "cuda" else None
    return {
        "model": model,
        "overrides": overrides,
        "kernels": chosen,
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
        "parts": part_ms | {"idle": max(0.0, median - sum(part_ms.values()))},
    }


def report(out: Console, row: dict[str, Any]) -> None:
    """Prints a row: times, utilisation, and a table of parts."""
    size = f"{row['parameters'] / 1e6:,.0f} M parameters, {row['rows']} x {row['seq_len']} tokens, bf16, ZeRO 1"
    out.print(f"\n[bold]{row['model']}[/]: {size}; kernels: {row['kernels']}")
    spread = f"{min(row['rounds']):.1f}-{max(row['rounds']):.1f}"
    peak = f", peak {row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
    out.print(f"{row['ms']:.1f} ms a step ({spread}), {row['tokens_per_s']:,.0f} tokens/s{peak}")
    spec = f", {row['mfu_spec']:.3f} of the data sheet's" if row["mfu_spec"] else ""
    reached = "reached" if row["mfu"] >= GOAL else "missed"
    rate = f"{row['matmul_flops'] / 1e12:,.2f} TFLOP/s"
    out.print(f"model FLOPs: {row['mfu']:.3f} of the {rate} that products reached here{spec} (goal: {GOAL}, {reached})")
    table = Table()
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, milliseconds in sorted(row["parts"].items(), key=lambda item: -item[1]):
        table.add_row(part, f"{milliseconds:.2f}", f"{milliseconds / row['ms']:.0%}")
    out.print(table)


def main(arguments: list[str]) -> int:
    """Measures each model, prints its row and appends it to the results. Returns 0."""
    parser = argparse.ArgumentParser(prog="bench mfu", description=(__doc__ or "").split("\n\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", default="gpt2_124m,llama_1b" if gpu else "gpt_tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=results.FOLDER / "mfu.jsonl")
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    options = parser.parse_intermixed_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    out = Console(width=None if sys.stdout.isatty() else 150)
    world = process_group.init_group(0, 1, 0, "gpu" if gpu else "cpu", process_group.Rendezvous("127.0.0.1", 0))
    about = results.machine(world.device)
    out.print("  ".join(f"{key} {value}" for key, value in about.items() if value))
    if not gpu:
        out.print("No GPU here: a tiny model's steps on the CPU, which only show that the measurement works.")
    for model in options.models.split(","):
        row = measure(model, options.overrides, options.steps, world)
        report(out, row)
        results.append(options.out, [{"bench": "mfu"} | about | row])
    process_group.destroy_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
