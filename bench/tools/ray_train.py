"""A job of Ray Train, the peer whose processes ``bench.restart`` and ``bench.faults`` kill.

    python -m bench.tools.ray_train FOLDER [group=choice] [key=value]

Each worker writes its pid and the time of its first step after a start to FOLDER, the first one every ``log_every``
steps its step to steps.jsonl. The job never ends by itself; given again on the same FOLDER, it resumes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from train.config import load as configuration
from train.config.schema import Config
from train.objectives import build_objective
from train.util.io import write_whole

VOCABULARY = 256
REPOSITORY = Path(__file__).resolve().parents[2]


def worker(options: dict[str, Any]) -> None:
    """Trains with plain DistributedDataParallel on one worker, with a checkpoint every ``save_every`` steps."""
    config, folder = configuration.parse(options["config"]), Path(options["folder"])
    rank, step, first = ray.train.get_context().get_world_rank(), 0, None
    model = torch.nn.parallel.DistributedDataParallel(build_objective(config, VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), config.optimizer.lr)
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as kept:
            state = torch.load(Path(kept) / "state.pt")
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while True:
        total, count = model(batch(config))["loss"]
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if first is None:
            first = time.time()
            write_whole(folder / f"rank_{rank}.json", json.dumps({"pid": os.getpid(), "first": first}).encode())
        if rank == 0 and step % config.log_every == 0:
            with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step}) + "\n")
        if step % config.save_every == 0:
            save(rank, {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()})


def batch(config: Config) -> dict[str, torch.Tensor]:
    """A batch of random tokens of this worker's share of the configured shape."""
    shape = (config.batch.global_ // config.cluster.worker_count, config.batch.seq_len)
    tokens = torch.randint(0, VOCABULARY, shape)
    positions = torch.arange(shape[1]).expand(shape)
    segments = torch.ones(shape, dtype=torch.int32)
    return {"tokens": tokens, "targets": tokens, "positions": positions, "segments": segments}


def save(rank: int, state: dict[str, Any]) -> None:
    """Reports a checkpoint to Ray Train; rank 0 writes it."""
    with tempfile.TemporaryDirectory() as kept:
        if rank == 0:
            torch.save(state, Path(kept) / "state.pt")
        ray.train.report({}, checkpoint=Checkpoint.from_directory(kept) if rank == 0 else None)


def main(arguments: list[str]) -> None:
    """Starts the job, which runs until it is killed."""
    folder, config = Path(arguments[0]), configuration.load(arguments[1:])
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so; as ours, its own is 15
    ray.init(
        "local",
        num_cpus=config.cluster.worker_count + 1,
        include_dashboard=False,
        runtime_env={"env_vars": environment},
    )
    TorchTrainer(
        worker,
        train_loop_config={"config": configuration.to_dict(config), "folder": str(folder)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=config.cluster.worker_count),
        run_config=RunConfig(
            name="job", storage_path=str(folder / "storage"), failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
