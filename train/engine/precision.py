"""Choice of the number format of forward and backward, once for all ranks of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from train.config import load as configuration
from train.config.schema import Config
from train.distributed import process_group
from train.distributed.device import Device, describe
from train.errors import UserError
from train.util.run_layout import RunDir


class PrecisionChoice(NamedTuple):
    """A precision ("fp32", "bf16" or "fp16"), and the reason for it, in words."""

    name: str
    why: str


def choose_precision(asked: str, kept: str | None, devices: Sequence[Device]) -> PrecisionChoice:
    """The precision of a run: ``asked`` for, or, where that is "auto", ``kept`` from the run's earlier starts, or the
    best that every rank's device has.

    Raises UserError where a GPU among ``devices``, ordered by rank, lacks it. Every CPU computes bf16, if slowly.
    """
    lacking = [rank for rank, device in enumerate(devices) if not device.bf16]
    if asked != "auto":
        choice = PrecisionChoice(asked, f"precision={asked}")
    elif kept:
        choice = PrecisionChoice(kept, "with which the run began")
    elif lacking:
        choice = PrecisionChoice("fp32", f"auto: {_who(lacking, devices)} has no bf16 instructions")
    else:
        choice = PrecisionChoice("bf16", "auto: every worker's device has it")
    if choice.name == "bf16":
        if gpus := [rank for rank in lacking if devices[rank].type == "cuda"]:
            raise UserError(
                f"precision=bf16 ({choice.why}), but {_who(gpus, devices)} has none: it came with compute capability "
                "8.0 (A100, RTX 3090). Start with precision=fp16 or precision=fp32, or on other GPUs"
            )
        if lacking:
            choice = choice._replace(why=f"{choice.why}; {_who(lacking, devices)} has no instructions for it: slow")
    return choice


def _who(ranks: Sequence[int], devices: Sequence[Device]) -> str:
    more = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
    return f"rank {ranks[0]}'s {devices[ranks[0]].name}{more}"


def resolve_precision(config: Config, world: process_group.DistContext) -> tuple[Config, str]:
    """The configuration with its precision chosen, the same on every rank, and the reason for it. A collective."""
    kept = _kept(RunDir(Path(config.run.dir or ""))) if world.is_rank0 else None
    said = process_group.gather_objects([asdict(describe(world.device)), kept])
    choice = choose_precision(config.precision.name, said[0][1], [Device(**values) for values, _ in said])
    precision = config.precision.model_copy(update={"name": choice.name})
    return config.model_copy(update={"precision": precision}), choice.why


def _kept(run_dir: RunDir) -> str | None:
    """The precision with which the run in a folder began; None for a new run."""
    with contextlib.suppress(UserError):
        return configuration.read(run_dir.config).precision.name
    return None
