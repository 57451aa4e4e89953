"""Time of a training step beside nanoGPT's own, same architecture, same machine, taking turns.

    ./launch.sh bench step --peer PATH [--rounds 15] [--steps 40] [--threads 2] [--stages 0,1,2,3] [key=value ...]

PATH is a checkout of nanoGPT, whose model.py is imported from there. Ours is the whole loop of ``train.loop`` as a run
has it: the loader and its thread, the count of tokens agreed on, DeepSpeed, clipping, AdamW, the log line every
``log_every`` steps. Theirs is the loop of its train.py, not compiled: a random batch, forward, backward,
clip_grad_norm_, its own AdamW, zero_grad, and the loss read every ``log_every`` steps; with ``precision=bf16`` in its
own autocast. Both from memory, on the same random characters. Evaluation and checkpoints are left out on both sides.
Each side is a process of its own, in the environment that its command gives it: ours has a worker's settings of the
allocator of memory, nanoGPT the caller's. A round runs each once; a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import random
import statistics
import string
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.nanogpt.checkout import load_peer
from bench.tools.bare_loop import NoServices, training
from bench.tools.results import middle, processor
from cluster.worker.fork_server_client import ALLOCATOR_ENV
from train.config import load as configuration
from train.config.schema import Config, Decoder
from train.data.corpus.shards import Corpus
from train.data.loader import loaders
from train.data.prepare import prepare
from train.distributed import process_group
from train.loop import train
from train.run import build_engine

GOAL = 1.05
CHARACTERS = string.printable[:65]
TEXT_LENGTH = 1_000_000
WARM_UP = 10

Turn = Callable[[int], None]
"""Trains for so many more steps."""
Build = Callable[[], tuple[Turn, int]]
"""Builds a side in its process: its turn, and its number of parameters."""


class Side:
    """A process that trains when it is told to."""

    def __init__(self, build: Build, threads: int, environment: dict[str, str]) -> None:
        """Starts it, with ``environment`` beside the caller's variables, which win."""
        processes = multiprocessing.get_context("spawn")
        self.orders, theirs = processes.Pipe()
        own = dict(os.environ)
        os.environ.update(environment | own)  # a process takes them when it starts
        self.process = processes.Process(target=_serve, args=(build, threads, theirs), daemon=True)
        self.process.start()
        os.environ.clear()
        os.environ.update(own)
        theirs.close()
        self.parameters: int = self._answer()

    def turn(self, steps: int) -> float:
        """Trains for so many more steps: the seconds that it took."""
        self.orders.send(steps)
        return float(self._answer())

    def _answer(self) -> Any:
        try:
            return self.orders.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(f"a side ended with exit code {self.process.exitcode}: its error is above") from None

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()


def _serve(build: Build, threads: int, orders: Connection) -> None:
    """A side's process: builds, tells its number of parameters, and trains and times as it is told."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(threads)
    turn, parameters = build()
    orders.send(parameters)
    with contextlib.suppress(EOFError):
        while True:
            steps = orders.recv()
            began = time.perf_counter()
            turn(steps)
            orders.send(time.perf_counter() - began)


def ours(config: Config, corpus_dir: Path) -> tuple[Turn, int]:
    """Our training loop, as a function that continues it, and its number of parameters."""
    corpus = Corpus(corpus_dir)
    world = process_group.init_group(0, 1, 0, "cpu", process_group.Rendezvous("127.0.0.1", 0))
    loader, _ = loaders(corpus, config, world)
    engine, _ = build_engine(config, corpus.tokenizer.vocab_size, world, loader)
    parameters = sum(shape.numel() for shape in engine.shapes.values())
    run = training(config, world, corpus, engine, loader, NoServices(world.size))

    def turn(steps: int) -> None:
        run.config = config.model_copy(update={"steps": run.state.step + steps})
        run.state = train(run)

    return turn, parameters


def theirs(config: Config, corpus_dir: Path, checkout: Path) -> tuple[Turn, int]:
    """nanoGPT's training loop, in the order of its train.py, and its number of parameters."""
    corpus, peer = Corpus(corpus_dir), load_peer(checkout)
    split, rows, length = corpus.split("train"), config.batch.global_, config.batch.seq_len
    assert isinstance(config.model, Decoder)
    tokens = torch.cat([torch.from_numpy(split.document(n).astype("int64")) for n in range(split.samples)])
    names = {"n_layer": config.model.layers, "n_head": config.model.heads, "n_embd": config.model.width}
    shape = peer.GPTConfig(
        block_size=length,
        vocab_size=corpus.tokenizer.vocab_size,
        dropout=config.model.dropout,
        bias=config.model.bias,
        **names,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it counts its parameters aloud
        model: Any = peer.GPT(shape)
        optimizer = model.configure_optimizers(
            config.optimizer.weight_decay, config.optimizer.lr, config.optimizer.betas, "cpu"
        )

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(tokens) - length, (rows,)).tolist()
        return torch.stack([tokens[i : i + length] for i in starts]), torch.stack(
            [tokens[i + 1 : i + 1 + length] for i in starts]
        )

    bf16 = config.precision.name == "bf16"

    def turn(steps: int) -> None:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.lr
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                _, loss = model(*batch())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % config.log_every == 0:
                loss.item()

    return turn, sum(p.numel() for p in model.parameters())


def measure(sides: dict[str, Side], rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds a step for every side in every round, after a warm-up; odd rounds run in reverse order."""
    for side in sides.values():
        side.turn(WARM_UP)
    times_by_side: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            times_by_side[name].append(1e3 * sides[name].turn(steps) / steps)
    return times_by_side


def numbers(text: str) -> list[int]:
    """The integers of a comma-separated list such as "0,2"."""
    return [int(part) for part in text.split(",")]


def main(arguments: list[str]) -> int:
    """Measures, prints the table, and returns 0 when the goal is met at the first of the stages."""
    parser = argparse.ArgumentParser(prog="bench step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="of each in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", type=numbers, default=[0, 1, 2, 3], help="ZeRO stages; the first is the goal's")
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    options = parser.parse_intermixed_args(arguments)
    load_peer(options.peer)  # what is no checkout of it is refused at once
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        text = Path(folder) / "text.txt"
        text.write_text("".join(random.Random(0).choices(CHARACTERS, k=TEXT_LENGTH)), encoding="utf-8")
        data = [f"data.paths=[{text}]", f"data.dir={folder}/corpus"]
        config = configuration.load(["experiment=shakespeare_char", "tracking=off", *data, *options.overrides])
        corpus_dir = prepare.prepare(config.data, lambda progress: None)
        builds: dict[str, Build] = {"nanoGPT": functools.partial(theirs, config, corpus_dir, options.peer)}
        for stage in options.stages:
            zero = config.zero.model_copy(update={"stage": stage})
            sharded = config.model_copy(update={"zero": zero})
            builds[f"ours, ZeRO {stage}"] = functools.partial(ours, sharded, corpus_dir)
        sides = {}
        for name, build in builds.items():
            environment = {} if name == "nanoGPT" else ALLOCATOR_ENV
            sides[name] = Side(build, options.threads, environment)
            cleanup.callback(sides[name].end)
        times_by_side = measure(sides, options.rounds, options.steps)
    return report(config, options, {name: side.parameters for name, side in sides.items()}, times_by_side)


def report(
    config: Config, options: argparse.Namespace, parameters: dict[str, int], times_by_side: dict[str, list[float]]
) -> int:
    """Prints the table; returns 1 if the goal is missed, else 0."""
    model, batch = config.model, config.batch
    out = Console()
    out.print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, {config.precision.name}")
    table = Table(
        title=f"{model.layers} layers, {model.width} wide, {batch.global_} x {batch.seq_len}: "
        f"{options.rounds} rounds of {options.steps} steps, taking turns"
    )
    for column in ("", "parameters", "ms a step", "range", "ratio", "range"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    ratios = {
        name: [a / b for a, b in zip(times, times_by_side["nanoGPT"], strict=True)]
        for name, times in times_by_side.items()
    }
    for name, times in times_by_side.items():
        table.add_row(name, f"{parameters[name]:,}", *middle(times, 2), *middle(ratios[name], 3))
    out.print(table)
    ratio = statistics.median(ratios[f"ours, ZeRO {options.stages[0]}"])
    out.print(f"ours / nanoGPT at ZeRO {options.stages[0]}: {ratio:.3f} (goal: at most {GOAL})")
    return int(ratio > GOAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
