"""Cost of a checkpoint to the steps, beside torch's own savers, and at every tenth step of the default run.

    ./launch.sh bench saves [--rounds 5] [--workers 1,2] [--model gpt2_124m] [--rows 1] [--seq-len 64] [--folder PATH]
                            [--savers ours,thread,process,torch] [--only stall|every_ten] [--out FILE]

The stall: GPT-2 124M with AdamW (1.5 GB of fp32 weights and moments) makes real steps over gloo, ZeRO 1. With a GPU the
steps are in bf16 on it, of one worker, at the shape of ``bench mfu``; ``--model auto`` takes llama_1b (15 GB) where
GPU, host and disk have room for it, else gpt2_124m. Each saver in turn, in the same processes, saves that state once a
round and the steps go on until it is written. "stall" is what the loop is held up: the call, and for ours also what the
next update waits for its copy. "lost" is all that training lost: the stall, and how much longer than the median
undisturbed step the steps took until the file was written. The first save of each, which allocates, is not counted.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from bench.mfu import SHAPES, TOKENIZER, Rows, choices, random_batch, wait
from bench.nanogpt.step import numbers
from bench.tools import goals, results
from bench.tools.bare_loop import NoServices, training
from bench.tools.results import processor
from train.checkpoint.writer import CheckpointWriter
from train.config import load as configuration
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import loaders
from train.data.prepare import prepare
from train.distributed import process_group
from train.engine.engine import Engine
from train.loop import train
from train.objectives import describe_objective
from train.reporting.tracking import Record
from train.run import build_engine
from train.state.train_state import TrainState

SHARE_GOAL = 0.03
STEPS = 40
EVERY = 10
UNDISTURBED = 5

SAVERS = {
    "ours": "ours",
    "thread": "async_save, thread",
    "process": "async_save, process",
    "torch": "torch.save",
}
"""Savers by their names on the command line."""
LARGE, SMALL = "llama_1b", "gpt2_124m"
CPU_SHAPE = (1, 64)
"""Rows and tokens of a worker's step on a CPU."""

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Room:
    """Free bytes of the GPU, of the host and of the disk."""

    gpu: int
    host: int
    disk: int

    def holds(self, parameters: int, activations: int) -> bool:
        """Whether a model can be trained here in bf16 and saved by two savers in turn, as an estimate.

        A parameter takes 20 bytes of the GPU: itself and its gradient in two formats, its master and two moments. Each
        saver keeps 12 bytes of it on the host; the disk has two of our checkpoints and one of the other's.
        """
        state = 12 * parameters
        enough = 20 * parameters + activations <= self.gpu
        return enough and 2.5 * state <= self.host and 3 * state <= self.disk

    @classmethod
    def here(cls, folder: str | None) -> Room:
        """The room of this machine, with checkpoints in ``folder``."""
        free = torch.cuda.mem_get_info()[0]
        return cls(free, psutil.virtual_memory().available, shutil.disk_usage(folder or tempfile.gettempdir()).free)


def choose_model(room: Room) -> str:
    """The larger model that there is room for."""
    config = configuration.load([f"model={LARGE}", "tracking=off"])
    objective = describe_objective(config, config.model.vocab_size or 0)
    rows, length = SHAPES[LARGE]
    activations = 40 * rows * length * config.model.layers * config.model.width  # bytes, as of Korthikanti et al. 2022
    return LARGE if room.holds(sum(p.numel() for p in objective.parameters()), activations) else SMALL


class Steps:
    """Real training steps of a large model on random tokens, and the state that the savers write."""

    def __init__(self, config: Config, world: process_group.DistContext) -> None:
        rows, length = config.batch.global_ // world.size, config.batch.seq_len
        vocabulary = config.model.vocab_size or TOKENIZER
        self.device = world.device
        self.engine, _ = build_engine(config, vocabulary, world, Rows(rows))
        self.batch = random_batch(config, vocabulary, world.device)
        self.batch = {name: value[:rows] for name, value in self.batch.items()}
        self.places = rows * length * world.size
        self.progress = TrainState()
        self.hold: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        """Makes one step; returns the seconds it took."""
        began = time.perf_counter()
        self.engine.train_step([self.batch], {"loss": self.places}, 1e-5, self.hold)
        wait(self.device)
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


def settings(options: argparse.Namespace, size: int) -> Config:
    """The configuration of the steps of ``size`` workers."""
    rows, length = CPU_SHAPE if not torch.cuda.is_available() else SHAPES.get(options.model, SHAPES[LARGE])
    rows, length = options.rows or rows, options.seq_len or length
    batch = [f"batch.global={size * rows}", f"batch.seq_len={length}", f"cluster.workers={size}"]
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    return configuration.load([f"model={options.model}", f"precision={precision}", "zero=1", "tracking=off", *batch])


def stalls(
    rank: int, size: int, port: int, folder: str, options: argparse.Namespace
) -> tuple[int, dict[str, list[tuple[float, float]]]]:
    """Bytes of the state, and (stall, lost) in seconds of every saver in every round, run as rank ``rank``."""
    torch.set_num_threads(options.threads // size)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    world = process_group.init_group(rank, size, rank, device, process_group.Rendezvous("127.0.0.1", port))
    steps = Steps(settings(options, size), world)
    place = Path(folder)
    ours = Ours(steps, place, world)
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours,
        "thread": lambda: AsyncSave(steps, place, world, AsyncCheckpointerType.THREAD),
        "process": lambda: AsyncSave(steps, place, world, AsyncCheckpointerType.PROCESS),
        "torch": lambda: TorchSave(steps, place, world),
    }
    savers = {SAVERS[name]: makers[name]() for name in options.savers}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in savers}
    for number in range(options.rounds + 1):
        for name in list(savers)[:: -1 if number % 2 else 1]:
            result = one_save(steps, savers[name], ours.saver, number)
            if number:
                times[name].append(result)
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in steps.state().values())
    ours.saver.close()
    return state_bytes * size, times


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
        super().__init__(engine.world_size)
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
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=enter, args=(queue, function, rank, size, port, str(folder), options))
        for rank in range(size)
    ]
    try:
        for process in ranks:
            process.start()
        while queue.empty():
            if any(process.exitcode for process in ranks):
                raise SystemExit("a rank failed; its traceback is above")
            time.sleep(0.1)
        return queue.get()
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def enter(queue: Any, function: Callable[..., Any], rank: int, *arguments: Any) -> None:
    """Entry of one rank's process; rank 0 puts its result into the queue."""
    result = function(rank, *arguments)
    if rank == 0:
        queue.put(result)
    process_group.barrier()


def report_stalls(
    out: Console, options: argparse.Namespace, size: int, measured: tuple[int, dict[str, list[tuple[float, float]]]]
) -> bool:
    """Prints the table of one world size and appends its rows; whether the goal is met beside the faster async saver
    of those measured.
    """
    state_bytes, times = measured
    what = f"{options.model} with AdamW, {state_bytes / 1e9:.1f} GB, {size} worker(s)"
    table = Table(title=f"{what}: seconds, median (range) of {options.rounds} rounds")
    for column in ("", "stall", "lost in all", "stall / async_save"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    columns = {name: list(zip(*pairs, strict=True)) for name, pairs in times.items()}
    middle = {name: statistics.median(stall) for name, (stall, _) in columns.items()}
    peer = min((value for name, value in middle.items() if name.startswith("async_save")), default=None)
    rows = []
    for name, (stall, lost) in columns.items():
        table.add_row(name, spread(stall), spread(lost), f"{middle[name] / peer:.3f}" if peer else "")
        rows.append({"saver": name, "stall_s": stall, "lost_s": lost})
    out.print(table)
    about = results.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about |= {"model": options.model, "state_bytes": state_bytes, "workers": size}
    if options.out:
        results.append(options.out, [{"bench": "saves"} | about | row for row in rows])
    return peer is None or "ours" not in middle or middle["ours"] <= goals.STALL_RATIO * peer


def spread(values: Sequence[float]) -> str:
    """The median and the range, as text."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main(arguments: list[str]) -> int:
    """Measures, prints the tables, and returns 0 when the goals are met, ``goals.MISSED`` when one is not."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench saves", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=numbers, default=[1] if gpu else [1, 2], help="sizes of the stalls' worlds")
    parser.add_argument("--model", default=SMALL, help="whose stalls are measured; auto: the largest there is room for")
    parser.add_argument("--savers", type=choices(SAVERS), default=list(SAVERS), help="some of: " + ", ".join(SAVERS))
    parser.add_argument("--rows", type=int, help="sequences a worker and step, for the stalls")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--threads", type=int, default=2, help="of all workers together")
    parser.add_argument("--folder", help="where to save; default: the place of temporary files")
    parser.add_argument("--only", choices=["stall", "every_ten"])
    parser.add_argument("--out", type=Path, help="a file for the rows of the stalls")
    options = parser.parse_args(arguments)
    if gpu and options.workers != [1]:
        parser.error("with a GPU the stalls are those of one worker, which has it: --workers 1")
    if options.model == "auto":
        options.model = choose_model(Room.here(options.folder)) if gpu else SMALL
    out, met = Console(width=110), []
    where = f"{torch.cuda.get_device_name()}, bf16" if gpu else f"{processor()}, {options.threads} threads, fp32"
    out.print(f"{where}, torch {torch.__version__}")
    if options.only != "every_ten":
        for size in options.workers:
            met.append(report_stalls(out, options, size, world_of(size, stalls, options)))
        out.print(f"goal: ours at most {goals.STALL_RATIO} of async_save")
    if options.only != "stall":
        met.append(report_every_ten(out, options))
    return 0 if all(met) else goals.MISSED


def report_every_ten(out: Console, options: argparse.Namespace) -> bool:
    """Measures the default run's saves and prints their cost; whether it is below the goal."""
    data = configuration.load(["tracking=off"]).data
    options.corpus = str(prepare.find_prepared(data) or prepare.prepare(data, lambda progress: None))
    times = world_of(2, every_ten, options)
    shares = [a / b - 1 for a, b in zip(times["with"], times["without"], strict=True)]
    out.print(f"the default run, 2 workers, {STEPS} steps a turn: without saves {spread(times['without'])} s, ", end="")
    out.print(f"one every {EVERY} steps {spread(times['with'])} s, of them waiting {spread(times['stall'])} s")
    out.print(f"cost of the saves: {statistics.median(shares):.2%} (goal: under {SHARE_GOAL:.0%})")
    return statistics.median(shares) < SHARE_GOAL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
