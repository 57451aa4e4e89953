"""Memory of real steps on this CPU beside the predicted: over families, ZeRO stages, precisions and recomputation.

    ./launch.sh bench plan [models=gpt_tiny,...] [stages=0,1,2,3] [precisions=fp32,bf16] [recompute=false,true]
                           [out=FILE] [key=value]

One rank. Allocations are those that torch's profiler sees, in the third step of an engine, all that lives before it
included.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from bench.tools import goals, results
from train.config import load as configuration
from train.config.schema import Config
from train.distributed import process_group
from train.distributed.process_group import DistContext
from train.engine.ds_patches import forget_process_groups
from train.errors import ExitCode, UserError
from train.planning.batches import full_batch
from train.planning.dry_run import DryRun, dry_run, rows_of, vocabulary
from train.run import build_engine

MODELS = ("gpt_tiny", "llama_tiny", "bert_tiny", "t5_tiny", "transformer_tiny", "lstm_tiny", "gru_tiny", "rnn_tiny")
STEPS = 3
OVER, UNDER = 0.03, -0.01
"""Of the memory measured: by how much the prediction may be above and below it."""
MARK = "step begins"
OPTIONS = {"models": ",".join(MODELS), "stages": "0,1,2,3", "precisions": "fp32,bf16", "recompute": "false,true"}


def peak_of_last_step(config: Config) -> int:
    """Bytes that a rank holds at the peak of the last of ``STEPS`` steps, measured by torch's profiler."""
    rows = rows_of(config, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        world = DistContext(0, 1, 0, torch.device("cpu"))
        engine, _ = build_engine(config, vocabulary(config), world, rows)
        for _ in range(STEPS):
            with record_function(MARK):
                pass
            batches = [full_batch(config, rows.micro) for _ in range(rows.micro_batches)]
            engine.train_step(batches, {"loss": 100, "next_loss": 1}, config.optimizer.lr, lambda: None)
            del batches
    del engine
    process_group.destroy_group()
    forget_process_groups()
    assert profiler.profiler is not None
    events = list(profiler.profiler.kineto_results.events())
    began = max(event.start_ns() for event in events if event.name() == MARK)
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held) if event.start_ns() >= began else held
    return peak


def compare(words: list[str]) -> tuple[DryRun, int]:
    """The dry run of a configuration on one rank, and the measured peak of its step."""
    config = configuration.load([*words, "cluster.workers=1", "tracking=off"])
    predicted = dry_run(config, 1)
    return predicted, peak_of_last_step(config)


def cases(given: dict[str, str]) -> list[list[str]]:
    """The configurations to compare, as words of the command line."""
    found = []
    axes = (given[name].split(",") for name in OPTIONS)
    for model, stage, precision, recompute in itertools.product(*axes):
        experiment = [f"experiment={model}"] if model.endswith("_tiny") else [f"model={model}"]
        words = [*experiment, f"zero.stage={stage}", f"precision={precision}"]
        if recompute != "false":
            if model.partition("_")[0] in ("lstm", "gru", "rnn"):
                continue
            words.append(f"model.checkpoint_activations={recompute}")
        found.append(words)
    return found


def main(arguments: list[str]) -> int:
    """Prints a row for each configuration; 0 when all predictions are within their bounds."""
    pairs = dict(word.partition("=")[::2] for word in arguments)
    given = OPTIONS | {key: value for key, value in pairs.items() if key in OPTIONS}
    more = [f"{key}={value}" for key, value in pairs.items() if key not in OPTIONS and key != "out"]
    out, rows, missed = Console(width=None if sys.stdout.isatty() else 140), list[dict[str, Any]](), 0
    table = Table(title="peak of a step, MB: predicted and measured")
    for column in ("configuration", "predicted", "measured", "difference"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for words in cases(given):
        try:
            predicted, measured = compare([*words, *more])
        except UserError as error:
            print(f"bench plan: {error}", file=sys.stderr)
            return ExitCode.BAD_INPUT
        error_share = predicted.step.nbytes / measured - 1
        missed += not UNDER <= error_share <= OVER
        row = {"configuration": " ".join(words), "predicted": predicted.step.nbytes, "measured": measured}
        rows.append(row | {"parts": predicted.step.parts})
        cells = (f"{predicted.step.nbytes / 1e6:,.3f}", f"{measured / 1e6:,.3f}", f"{error_share:+.1%}")
        table.add_row(" ".join(words), *cells)
        print(" ".join(words), *cells, predicted.step.parts, file=sys.stderr, flush=True)
    out.print(table)
    out.print(f"{len(rows) - missed} of {len(rows)} are within {UNDER:.0%} and {OVER:+.0%}")
    if "out" in pairs:
        about = {"bench": "plan"} | results.machine(torch.device("cpu"))
        results.append(Path(pairs["out"]), [about | row for row in rows])
    return goals.MISSED if missed else ExitCode.OK


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # DeepSpeed keeps groups, whose threads may outlive the interpreter's own end
