"""Opening a run's folder at a checkpoint, to evaluate, generate or export."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import manifest
from train.checkpoint.reader import Checkpoint, CheckpointReader, list_checkpoints
from train.config import load as configuration
from train.config.schema import Config
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.distributed.param_shard import MASTER
from train.engine.allocation import allocate_parameters
from train.errors import UserError
from train.objectives import describe_objective
from train.util.format import some
from train.util.run_layout import RunDir


@dataclass(frozen=True)
class SavedRun:
    """A run at one of its checkpoints, verified and open: it stays readable when the run deletes it meanwhile."""

    config: Config
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    reader: CheckpointReader

    @cached_property
    def objective(self) -> Any:
        """The trained objective, in fp32 and in eval mode; loaded at first use."""
        return load_objective(self)


def open_run(folder: Path, which: str = "latest") -> SavedRun:
    """The run in ``folder`` at checkpoint ``which``: "latest", "best" (by its stop.metric) or a step.

    Raises UserError for a folder without a run, or a checkpoint that is missing or damaged.
    """
    config = configuration.read(RunDir(folder).config)
    checkpoint, reader = _open_checkpoint(folder, which)
    return SavedRun(config, load_tokenizer(folder), checkpoint, reader)


def load_objective(run: SavedRun) -> Any:
    """The objective of a run with its trained weights, in fp32, in eval mode. UserError where any is not finite."""
    objective: Any = describe_objective(run.config, run.tokenizer.vocab_size)
    allocate_parameters(objective, torch.device("cpu"), torch.float32, stage=0)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_(run.reader.read(name, MASTER, 0, math.prod(parameter.shape)).view_as(parameter))
    if broken := [name for name, parameter in objective.named_parameters() if not torch.isfinite(parameter).all()]:
        raise UserError(
            f"{run.checkpoint.path} holds numbers that are not finite, in {some(broken, 3)}: the model has diverged "
            "there. Choose another with checkpoint=<step>"
        )
    return objective.eval()


def _open_checkpoint(folder: Path, which: str) -> tuple[Checkpoint, CheckpointReader]:
    """The checkpoint ``which``, verified and open. Tries again where the run, still training, deletes it for a newer
    one.
    """
    while True:
        whole, damaged = list_checkpoints(RunDir(folder).checkpoints)
        newest = max([*damaged, *(c.progress.step for c in whole)], default=None)
        if which == "latest" and newest is not None and newest in damaged:
            path, damage = RunDir(folder).checkpoint(newest), damaged[newest]
        else:
            checkpoint = whole[manifest.select([c.manifest for c in whole], which, folder)]
            path, damage = checkpoint.path, ""
            # Where the run drops the checkpoint meanwhile, hashing it finds no file, and torch, which maps it, a
            # RuntimeError.
            with contextlib.suppress(FileNotFoundError, RuntimeError):
                damage = checkpoint.damage() or ""
                if not damage:
                    return checkpoint, checkpoint.reader(keep_open=True)
        if path.exists():
            raise UserError(f"{path} is damaged: {damage}. Choose another with checkpoint=<step>")
