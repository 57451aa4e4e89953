"""Process groups for tests: gloo ranks, each forked from a process that has imported everything already."""

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
from train.events import Event

REPOSITORY = Path(__file__).resolve().parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])  # for the fork server
os.environ.pop("TRIREME_T0", None)  # the start of the tests; each job's clock starts with the job
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train.run", "helpers.gloo_ranks", "helpers.freeze"])

TINY = [
    *("model=gpt_tiny", "model.layers=2", "model.width=32", "model.max_len=32", "batch.seq_len=16", "batch.global=4"),
    *("steps=8", "log_every=1", "eval_every=4", "save_every=4", "keep_last=9", "tracking=off", "generation.prompts=[]"),
    *("optimizer=adamw", "optimizer.lr=1e-2", "schedule=constant", "precision=fp32", "cluster.workers=2"),
]

TEXT = [
    *("data=text", "data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=null"),
    *("data.shard_tokens=1000", "data.val_fraction=0.2"),
]


@dataclass
class Rank:
    """How one rank ended: its exit code, its result or traceback, and the events it emitted."""

    code: int | None
    result: Any = None
    error: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Running:
    """A running group: its processes by rank, and the pipes that they answer through."""

    processes: list[Any]
    pipes: list[Any]

    def kill(self, rank: int | None = None) -> None:
        """Kills one rank with SIGKILL, or all of them at once."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, signal.SIGKILL)

    def wait(self, timeout: float = 120) -> list[Rank]:
        """Waits for all ranks and returns how each ended. AssertionError when one does not end in time."""
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
    """Starts ``function(context, emit, *arguments)`` on ``size`` ranks; its result must be picklable."""
    processes, pipes = [], []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for rank in range(size):
            ours, theirs = FORKS.Pipe()
            rendezvous = port, listener if rank == 0 else None
            process = FORKS.Process(target=_run_rank, args=(rank, size, rendezvous, theirs, function, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
    return Running(processes, pipes)


def run(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Runs a function as ``start`` does and returns all ranks' results; AssertionError where a rank failed."""
    ranks = start(size, function, *arguments).wait(timeout)
    failed = [f"rank {n} (exit {r.code}): {r.error}" for n, r in enumerate(ranks) if r.code != 0]
    assert not failed, "\n".join(failed)
    return [rank.result for rank in ranks]


def _run_rank(
    rank: int,
    size: int,
    rendezvous: tuple[int, socket.socket | None],
    pipe: Any,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    import torch

    from train.distributed import process_group

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed's calls, at every step
    lock = threading.Lock()  # background threads emit events too

    def emit(event: dict[str, Any]) -> None:
        with lock:
            pipe.send(("event", event))

    try:
        port, listener = rendezvous
        fd = listener and listener.detach()
        context = process_group.init_group(
            rank, size, rank, "cpu", process_group.Rendezvous("127.0.0.1", port, listen_fd=fd, timeout_s=60)
        )
        pipe.send(("result", function(context, emit, *arguments)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        os._exit(1)
    os._exit(0)


def compose(*overrides: str) -> Config:
    """The tiny test configuration, changed by ``overrides``."""
    return configuration.load([*TINY, *overrides])


def on_corpus(corpus: Path, run: Path, *overrides: str) -> Config:
    """The tiny test configuration on a prepared corpus, with the run in a folder of its own."""
    return compose(*TEXT, "data.paths=[x]", f"data.dir={corpus}", f"run.dir={run}", *overrides)


def train(context: Any, emit: Any, config: dict[str, Any], corpus: str, stop_when: dict[str, Any] | None = None) -> str:
    """Trains as one rank, and stops after an event with ``stop_when``'s values.

    Returns "done", "stopped" or the text of a UserError.
    """
    from train.errors import Stopped, UserError
    from train.run import train_rank

    stop = False

    def watch(event: Event) -> None:
        nonlocal stop
        record = event.to_json()
        stop = stop or (stop_when is not None and stop_when.items() <= record.items())
        emit(record)

    try:
        train_rank(configuration.parse(config), corpus, context, watch, lambda: stop)
    except Stopped:
        return "stopped"
    except UserError as error:
        return str(error)
    return "done"


def train_world(
    config: Config, corpus: Path, stop_when: dict[str, Any] | None = None, timeout: float = 120
) -> list[str]:
    """Trains on ``cluster.workers`` ranks to the end; each rank's result, see ``train``."""
    size = config.cluster.worker_count
    return run(size, train, configuration.to_dict(config), str(corpus), stop_when, timeout=timeout)


TIMES = ("tokens_per_s", "tokens_per_s_per_worker", "mfu_measured", "step_s_p50", "step_s_p99", "save_stall_s")


def metrics(config: Config) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without the times."""
    lines = (Path(config.run.dir or "") / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        for key in TIMES:
            record.pop(key, None)
    return records


def state(config: Config, step: int) -> dict[str, Any]:
    """Each parameter's weights and moments in the checkpoint of ``step``, assembled from all ranks."""
    from train.checkpoint.reader import complete

    folder = Path(config.run.dir or "") / "checkpoints"
    checkpoint = next(c for c in complete(folder) if c.progress.step == step)
    reader, shapes = checkpoint.reader(), checkpoint.manifest["shapes"]
    whole = {}
    for (name, kind), shards in reader.pieces.items():
        elements = sum(shard[1] for shard in shards)
        whole[f"{kind}/{name}"] = reader.read(name, kind, 0, elements).view(shapes[name])
    return whole


def whole_weights(engine: Any) -> dict[str, Any]:
    """Every parameter of an engine's module, whole and in fp32, on rank 0; empty ones on the others. A collective."""
    import torch

    weights = {}
    for name, param in engine.module.named_parameters():
        with engine.gathered(param):
            weights[name] = param.detach().float().clone() if engine.rank == 0 else torch.empty(0)
    return weights
