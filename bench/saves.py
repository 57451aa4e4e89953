"""Cost of a checkpoint to the steps, beside torch's own savers, and at every tenth step of the default run.

    ./launch.sh bench saves [--rounds 5] [--workers 1,2] [--rows 1] [--seq-len 64] [--folder PATH]
                            [--only stall|every_ten]

The stall: GPT-2 124M with AdamW (1.5 GB of fp32 weights and moments) makes real steps over gloo, ZeRO 1. Each saver in
turn, in the same processes, saves that state once a round and the steps go on until it is written. "stall" is what the
loop is held up: the call, and for ours also what the next update waits for its copy. "lost" is all that training lost:
the stall, and how much longer than the median undisturbed step the steps took until the file was written. The first
save of each, which allocates, is not counted.

Every tenth step: the default run's model, batch and loop (``train.loop``), 2 workers, taking turns with and without
saves.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from bench.step import NoServices, numbers, processor, training
from train.checkpoint.writer import CheckpointWriter
from train.config import load as configuration
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import loaders
from train.data.prepare import prepare
from train.distributed import process_group
from train.engine.engine import Engine
from train.loop import train
from train.objectives import build_objective
from train.optim.factory import build_optimizer, parameter_groups
from train.reporting.tracking import Record
from train.run import build_engine
from train.state.train_state import TrainState

STALL_GOAL, SHARE_GOAL = 0.25, 0.03
STEPS = 40
EVERY = 10
UNDISTURBED = 5

Begin = Callable[[], None]
Times = dict[str, list[float]]


class Steps:
    """Real training steps of a large model on random tokens, and the state that the savers write."""

    def __init__(self, config: Config, world: process_group.DistContext) -> None:
        objective = build_objective(config, config.model.vocab_size or 0)
        optimizer = build_optimizer(config.optimizer, parameter_groups(objective, 0.0))
        rows, length = config.batch.global_ // world.size, config.batch.seq_len
        self.engine = Engine(objective, optimizer, config, world, rows, 1)
        tokens = torch.randint(1000, (rows, length))
        places = torch.arange(length).expand(rows, length)
        one = torch.ones(rows, length, dtype=torch.int32)
        self.batch = {"tokens": tokens, "targets": tokens, "positions": places, "segments": one}
        self.places = rows * length * world.size
        self.progress = TrainState()
        self.hold: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        """Makes one step; returns the seconds it took."""
        began = time.perf_counter()
        self.engine.train_step([self.batch], {"loss": self.places}, 1e-5, self.hold)
        return time.perf_counter() - began

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer moments of this rank's shards."""
        state = {}
        for shard in self.engine.param_shards:
            state |= {f"{kind}/{shard.name}": view for kind, view in self.engine.states(shard).items()}
        return state


class Ours:
    """Saves with our own ``train.checkpoint.writer``."""

    def __init__(self, steps: Steps, folder: Path, world: process_group.DistContext) -> None:
        self.steps, self.saver = steps, CheckpointWriter(folder / "ours", 1, 0, world)
        steps.hold = self.saver.wait_for_staging

    def begin(self, number: int) -> None:
        """Begins a save in the background."""
        self.saver.wait_for_save()
        self.saver.save(self.steps.engine, TrainState(step=number), None, {}, lambda: None)

    def busy(self) -> bool:
        """Whether it is still being written."""
        return self.saver.busy


class TorchSave:
    """Saves with ``torch.save``, a file for each rank."""

    def __init__(self, steps: Steps, folder: Path, world: process_group.DistContext) -> None:
        self.steps, self.file = steps, folder / f"torch_{world.rank}.pt"

    def begin(self, number: int) -> None:
        """Saves, and returns when it is written."""
        with self.file.open("wb") as out:
            torch.save(self.steps.state(), out)
            out.flush()

    def busy(self) -> bool:
        """Never: ``begin`` returns only when the file is written."""
        return False


class AsyncSave:
    """Saves with ``torch.distributed.checkpoint.async_save``, in a background thread or process."""

    def __init__(
        self, steps: Steps, folder: Path, world: process_group.DistContext, kind: AsyncCheckpointerType
    ) -> None:
        self.steps, self.folder, self.kind, self.world = steps, folder / kind.value, kind, world
        self.group = torch.distributed.new_group(backend="gloo")  # else its sums would meet those of the steps
        self.future: Any = None

    def begin(self, number: int) -> None:
        """Copies the state and hands it to the background."""
        state = {f"{self.world.rank}/{name}": value for name, value in self.steps.state().items()}
        self.future = dcp.async_save(
            state, checkpoint_id=self.folder, process_group=self.group, async_checkpointer_type=self.kind
        )

    def busy(self) -> bool:
        """Whether it is still being written."""
        done = getattr(self.future, "upload_completion", self.future)
        return not done.done()


def stalls(
    rank: int, size: int, port: int, folder: str, options: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """(stall, lost) in seconds of every saver in every round, run as rank ``rank``."""
    torch.set_num_threads(options.threads // size)
    world = process_group.init_group(rank, size, rank, "cpu", process_group.Rendezvous("127.0.0.1", port))
    batch = [f"batch.global={size * options.rows}", f"batch.seq_len={options.seq_len}"]
    config = configuration.load(
        ["model=gpt2_124m", "precision=fp32", "zero=1", "tracking=off", f"cluster.workers={size}", *batch]
    )
    steps = Steps(config, world)
    place = Path(folder)
    savers: dict[str, Any] = {
        "ours": Ours(steps, place, world),
        "async_save, thread": AsyncSave(steps, place, world, AsyncCheckpointerType.THREAD),
        "async_save, process": AsyncSave(steps, place, world, AsyncCheckpointerType.PROCESS),
        "torch.save": TorchSave(steps, place, world),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in savers}
    for number in range(options.rounds + 1):
        for name in list(savers)[:: -1 if number % 2 else 1]:
            result = one_save(steps, savers[name], savers["ours"].saver, number)
            if number:
                times[name].append(result)
    savers["ours"].saver.close()
    return times


def one_save(steps: Steps, saver: Any, ours: CheckpointWriter, number: int) -> tuple[float, float]:
    """(stall, lost) of one save, in seconds."""
    usual = statistics.median(steps() for _ in range(UNDISTURBED))
    process_group.barrier()
    held, began = ours.stall_s, time.perf_counter()
    saver.begin(number)
    call, lost, more = time.perf_counter() - began, 0.0, True
    while more:
        lost += steps() - usual
        more = process_group.all_reduce_sum([float(saver.busy())])[0] > 0
    inside = ours.stall_s - held  # of ours: the call, and the wait before the update
    return max(call, inside), call + lost


def every_ten(rank: int, size: int, port: int, folder: str, options: argparse.Namespace) -> Times:
    """Seconds by round: a block of steps without saves, one with saves, and its steps' waits for saves."""
    torch.set_num_threads(1)
    world = process_group.init_group(rank, size, rank, "cpu", process_group.Rendezvous("127.0.0.1", port))
    config = configuration.load(["precision=fp32", "tracking=off", f"cluster.workers={size}"])
    corpus = Corpus(options.corpus)
    loader, _ = loaders(corpus, config, world)
    engine, _ = build_engine(config, corpus.tokenizer.vocab_size, world, loader)
    services = SaveService(CheckpointWriter(Path(folder), 2, 0, world), engine)
    run = training(config, world, corpus, engine, loader, services)
    times: Times = {"without": [], "with": [], "stall": []}

    def block(steps: int, save_every: int) -> float:
        run.config = config.model_copy(
            update={"steps": run.state.step + steps, "save_every": save_every, "eval_every": 0}
        )
        began = time.perf_counter()
        run.state = train(run)
        return time.perf_counter() - began

    block(EVERY + EVERY // 2, EVERY)  # so that a block's last save has half of EVERY steps to be written behind
    for number in range(2 * options.rounds):
        held, on = services.stall_s, (number + number // 2) % 2 == 1
        seconds = block(STEPS, EVERY if on else 0)
        times["with" if on else "without"].append(seconds)
        if on:
            times["stall"].append(services.stall_s - held)
    loader.close()
    services.saver.close()
    return times


class SaveService(NoServices):
    """Services of a run without any but the saves that come due every EVERY steps."""

    def __init__(self, saver: CheckpointWriter, engine: Engine) -> None:
        self.saver, self.engine = saver, engine

    def save(self, state: TrainState, val_loss: float | None, pending: Record | None) -> None:
        """Begins a checkpoint if one is due; not at the end of a block."""
        if state.step % EVERY == 0:
            self.saver.wait_for_save()
            self.saver.save(self.engine, state, None, {}, lambda: None)

    def wait_for_staging(self) -> None:
        """Waits until the weights and moments are copied."""
        self.saver.wait_for_staging()

    def wait_for_save(self) -> None:
        """Waits for the save in flight."""
        self.saver.wait_for_save()

    @property
    def stall_s(self) -> float:
        """Seconds that steps waited for saves so far."""
        return self.saver.stall_s


def world_of(size: int, function: Callable[..., Any], options: argparse.Namespace) -> Any:
    """Runs ``function`` on ``size`` processes, one a rank, and returns the result of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=enter, args=(results, function, rank, size, port, str(folder), options))
        for rank in range(size)
    ]
    try:
        for process in ranks:
            process.start()
        while results.empty():
            if any(process.exitcode for process in ranks):
                raise SystemExit("a rank failed; its traceback is above")
            time.sleep(0.1)
        return results.get()
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def enter(results: Any, function: Callable[..., Any], rank: int, *arguments: Any) -> None:
    """Entry of one rank's process; rank 0 puts its result into the queue."""
    result = function(rank, *arguments)
    if rank == 0:
        results.put(result)
    process_group.barrier()


def report_stalls(out: Console, size: int, times: dict[str, list[tuple[float, float]]], rounds: int) -> bool:
    """Prints the table of one world size; whether the goal is met beside the faster of the two async savers."""
    table = Table(title=f"GPT-2 124M with AdamW, 1.5 GB, {size} worker(s): seconds, median (range) of {rounds} rounds")
    for column in ("", "stall", "lost in all", "stall / async_save"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    columns = {name: list(zip(*pairs, strict=True)) for name, pairs in times.items()}
    middle = {name: statistics.median(stall) for name, (stall, _) in columns.items()}
    peer = min(value for name, value in middle.items() if name.startswith("async_save"))
    for name, (stall, lost) in columns.items():
        table.add_row(name, spread(stall), spread(lost), f"{middle[name] / peer:.3f}")
    out.print(table)
    return middle["ours"] <= STALL_GOAL * peer


def spread(values: Sequence[float]) -> str:
    """The median and the range, as text."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main(arguments: list[str]) -> int:
    """Measures, prints the tables, and returns 0 when the goals are met."""
    parser = argparse.ArgumentParser(prog="bench saves", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--workers", type=numbers, default=[1, 2], help="sizes of the worlds that stalls are measured in"
    )
    parser.add_argument("--rows", type=int, default=1, help="sequences a worker and step, for the stalls")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of all workers together")
    parser.add_argument("--folder", help="where to save; default: the place of temporary files")
    parser.add_argument("--only", choices=["stall", "every_ten"])
    options = parser.parse_args(arguments)
    out, met = Console(width=110), []
    out.print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, fp32")
    if options.only != "every_ten":
        for size in options.workers:
            met.append(report_stalls(out, size, world_of(size, stalls, options), options.rounds))
        out.print(f"goal: ours at most {STALL_GOAL} of async_save")
    if options.only != "stall":
        data = configuration.load(["tracking=off"]).data
        options.corpus = str(prepare.find_prepared(data) or prepare.prepare(data, lambda progress: None))
        times = world_of(2, every_ten, options)
        shares = [a / b - 1 for a, b in zip(times["with"], times["without"], strict=True)]
        out.print(
            f"the default run, 2 workers, {STEPS} steps a turn: without saves {spread(times['without'])} s, ", end=""
        )
        out.print(f"one every {EVERY} steps {spread(times['with'])} s, of them waiting {spread(times['stall'])} s")
        out.print(f"cost of the saves: {statistics.median(shares):.2%} (goal: under {SHARE_GOAL:.0%})")
        met.append(statistics.median(shares) < SHARE_GOAL)
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
