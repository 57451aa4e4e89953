"""Real worlds for tests: gloo ranks, each a process forked from one that has imported everything already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from train.config import load as configuration
from train.config.schema import Config

REPOSITORY = Path(__file__).resolve().parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])  # for the server of forks
os.environ.pop("TRIREME_T0", None)  # when the tests were begun; a world's command is given when it starts
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train.run", "helpers.gloo_ranks", "helpers.freeze"])

TINY = [
    *("model=gpt_tiny", "model.layers=2", "model.width=32", "model.max_len=32", "batch.seq_len=16", "batch.global=4"),
    *("steps=8", "log_every=1", "eval_every=4", "save_every=4", "keep_last=9", "tracking=off", "generation.prompts=[]"),
    *("optimizer.lr=1e-2", "schedule=constant"),
]

TEXT = [
    *("data=text", "data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=null"),
    *("data.shard_tokens=1000", "data.val_fraction=0.2"),
]


@dataclass
class Rank:
    """What one rank of a finished world left: its exit code, its result or traceback, the events it emitted."""

    code: int | None
    result: Any = None
    error: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Running:
    """A world that runs: its processes, by rank, and the pipes that they answer through."""

    processes: list[Any]
    pipes: list[Any]

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank, or all of them at once."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, signal.SIGKILL)

    def wait(self, timeout: float = 120) -> list[Rank]:
        """What every rank left. Fails loudly when one does not end."""
        deadline, ranks = time.monotonic() + timeout, [Rank(None) for _ in self.processes]
        open_pipes = dict(zip(self.pipes, ranks, strict=True))
        while open_pipes and time.monotonic() < deadline:
            for pipe in wait(list(open_pipes), 0.05):  # all in turn: a rank whose pipe is full stands still
                try:
                    kind, value = pipe.recv()
                    open_pipes[pipe].events.append(value) if kind == "event" else setattr(open_pipes[pipe], kind, value)
                except (EOFError, ConnectionResetError):
                    del open_pipes[pipe]
        for number, (process, rank) in enumerate(zip(self.processes, ranks, strict=True)):
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                self.kill()
                raise AssertionError(f"rank {number} did not end within {timeout} s")
            rank.code = process.exitcode
        return ranks


def start(size: int, function: Callable[..., Any], *arguments: Any) -> Running:
    """Start ``function(world, emit, *arguments)`` on ``size`` ranks; its result must be picklable."""
    processes, pipes = [], []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for rank in range(size):
            ours, theirs = FORKS.Pipe()
            meeting = port, listener if rank == 0 else None
            process = FORKS.Process(target=_enter, args=(rank, size, meeting, theirs, function, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
    return Running(processes, pipes)


def run(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """The results of all ranks; a rank's exception is this process's AssertionError."""
    ranks = start(size, function, *arguments).wait(timeout)
    failed = [f"rank {n} (exit {r.code}): {r.error}" for n, r in enumerate(ranks) if r.code != 0]
    assert not failed, "\n".join(failed)
    return [rank.result for rank in ranks]


def _enter(
    rank: int,
    size: int,
    meeting: tuple[int, socket.socket | None],
    pipe: Any,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    import torch

    from train.distributed import process_group

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed's calls, at every step
    alone = threading.Lock()  # what is done behind the steps has its word too

    def emit(event: dict[str, Any]) -> None:
        with alone:
            pipe.send(("event", event))

    try:
        port, listener = meeting
        fd = listener and listener.detach()
        world = process_group.init_group(
            rank, size, rank, "cpu", process_group.Rendezvous("127.0.0.1", port, listen_fd=fd, timeout_s=60)
        )
        pipe.send(("result", function(world, emit, *arguments)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        os._exit(1)
    os._exit(0)


def compose(*overrides: str) -> Config:
    """The tiny test configuration with overrides."""
    return configuration.load([*TINY, *overrides])


def on_corpus(corpus: Path, run: Path, *overrides: str) -> Config:
    """The tiny test configuration on a prepared corpus, with the run in a folder of its own."""
    return compose(*TEXT, "data.paths=[x]", f"data.dir={corpus}", f"run.dir={run}", *overrides)


def train(world: Any, emit: Any, config: dict[str, Any], corpus: str, stop_when: dict[str, Any] | None = None) -> str:
    """Train as one rank; stop when an event holds ``stop_when``'s values. "done", "stopped" or the UserError's text."""
    from train.errors import Stopped, UserError
    from train.run import train_rank

    asked = False

    def watch(event: dict[str, Any]) -> None:
        nonlocal asked
        asked = asked or (stop_when is not None and stop_when.items() <= event.items())
        emit(event)

    try:
        train_rank(configuration.parse(config), corpus, world, watch, lambda: asked)
    except Stopped:
        return "stopped"
    except UserError as error:
        return str(error)
    return "done"


def train_world(
    config: Config, corpus: Path, stop_when: dict[str, Any] | None = None, timeout: float = 120
) -> list[str]:
    """Run a world of ``cluster.workers`` ranks to its end."""
    size = config.cluster.workers
    return run(size, train, configuration.to_dict(config), str(corpus), stop_when, timeout=timeout)


TIMES = ("tokens_per_s", "save_stall_s")


def metrics(config: Config) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without the times."""
    lines = (Path(config.run.dir or "") / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def state(config: Config, step: int) -> dict[str, Any]:
    """Every parameter's weights and moments in a checkpoint, whole."""
    from train.checkpoint.reader import complete

    folder = Path(config.run.dir or "") / "checkpoints"
    found = next(c for c in complete(folder) if c.progress.step == step)
    reader, shapes = found.reader(), found.manifest["shapes"]
    whole = {}
    for (name, kind), places in reader.pieces.items():
        whole[f"{kind}/{name}"] = reader.read(name, kind, 0, sum(p[1] for p in places)).view(shapes[name])
    return whole
