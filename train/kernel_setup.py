"""Choice of kernels, and tuning of Triton's tiles before the first step."""

from __future__ import annotations

import torch

import kernels
from train.batch import Batch, to_device
from train.config.schema import Config
from train.distributed import process_group
from train.errors import UserError
from train.objectives import build_objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_kernels(config: Config, vocab_size: int, world: process_group.DistContext, batch: Batch) -> str:
    """Use ``config.kernels`` on this rank's device; returns the choice and its reason, in words. A collective.

    Tiles are measured on ``batch``, one of the run's, for shapes that are new to this machine; the other ranks of a
    host wait for its first one and load its table and compiled kernels from disk. Raises UserError where Triton is
    asked for and cannot run.
    """
    try:
        chosen = kernels.use(config.kernels, world.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    if world.device.type == "cuda":
        if world.local_rank == 0:
            measure_tiles(config, vocab_size, to_device(batch, world.device))
        process_group.barrier()
    return chosen


def measure_tiles(config: Config, vocab_size: int, batch: Batch) -> None:
    """One forward and backward pass of the run's model cut to one layer, measuring tiles for shapes that are new."""
    short = config.model_copy(update={"model": config.model.model_copy(update={"layers": 1})})
    objective = build_objective(short, vocab_size).to(batch["tokens"].device, DTYPES[config.precision.name])
    with kernels.measuring_tiles():
        torch.stack([total for total, _ in objective(batch).values()]).sum().backward()
