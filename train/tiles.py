"""Which kernels a rank runs, and the tiles of Triton's, measured before the first step by one process of each host."""

from __future__ import annotations

import torch

import kernels
from train import dist
from train.batch import Batch
from train.errors import UserError
from train.objectives import build_objective
from train.schema import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DOCUMENTS = 4
"""Documents in a row of the batch that is measured on."""


def choose_kernels(config: Config, vocab_size: int, world: dist.World) -> str:
    """Makes this process use ``config.kernels`` on its device; says in words what that is, and why. A collective.

    Tiles are measured where shapes are new to this machine; ranks that share a host wait for the first of them, whose
    table and compiled kernels they then find on the disk. Raises UserError where Triton is asked for and cannot run.
    """
    try:
        chosen = kernels.use(config.kernels, world.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    if world.device.type == "cuda":
        if world.local_rank == 0:
            measure(config, vocab_size, world.device)
        dist.barrier()
    return chosen


def measure(config: Config, vocab_size: int, device: torch.device) -> None:
    """One forward and backward pass of the run's model cut to a single layer, measuring tiles for every shape that is new."""
    short = config.model_copy(update={"model": config.model.model_copy(update={"layers": 1})})
    objective = build_objective(short, vocab_size).to(device, DTYPES[config.precision.name])
    with kernels.measuring():
        total, _ = objective(_batch(config, vocab_size, device))["loss"]
        total.backward()


def _batch(config: Config, vocab_size: int, device: torch.device) -> Batch:
    """A micro-batch of the run's shape, its rows cut into a few documents of equal length."""
    rows = config.batch.micro or -(-config.batch.global_ // config.cluster.workers)
    place = torch.arange(config.batch.seq_len, device=device).expand(rows, -1)
    length = -(-config.batch.seq_len // DOCUMENTS)
    tokens = place % vocab_size
    return {"tokens": tokens, "targets": tokens, "positions": place % length, "segments": (place // length + 1).int()}
