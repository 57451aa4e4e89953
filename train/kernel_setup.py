"""Choice of kernels, and tuning of Triton's tiles and of attention before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
import kernels.tuning as tuning
from train.batch import Batch, to_device
from train.config.schema import Config
from train.distributed import process_group
from train.errors import UserError
from train.objectives import build_objective
from train.util.io import write_whole
from train.util.run_layout import RunDir

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = {"triton": "Triton's kernels", "cudnn": "cuDNN", "flash": "torch's flash kernels"}


def choose_kernels(
    config: Config, vocab_size: int, world: process_group.DistContext, batch: Batch, note: Callable[[str], None]
) -> str:
    """Use ``config.kernels`` on this rank's device; returns the choice and its reason, in words. A collective.

    Tiles and the attention of each shape are measured on ``batch``, one of the run's, where neither the run's folder
    nor this machine has them. Raises UserError where Triton is asked for and cannot run.
    """
    try:
        chosen = kernels.use(config.kernels, world.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    if world.device.type != "cuda":
        return chosen
    measure = partial(measure_tiles, config, vocab_size, to_device(batch, world.device))
    made_on = {"kernels": chosen, **tuning.identity()}
    choices = share_choices(RunDir(Path(config.run.dir or "")).kernels, made_on, world, measure, note)
    return chosen + describe_attention(choices)


def share_choices(
    file: Path,
    made_on: dict[str, str],
    world: process_group.DistContext,
    measure: Callable[[], None],
    note: Callable[[str], None],
) -> tuning.Choices:
    """Make the choices of the run's kernels those of ``file`` and of rank 0, on every rank, and write them there.

    They decide the order of sums, so a resume on another host, or with an emptied cache, must not measure others. They
    hold for a rank whose GPU, versions and sources, ``made_on``, are those they were made on; any other measures its
    own, and a note says what is lost. Then the first rank of each host compiles what was chosen, by ``measure()``.
    """
    if world.is_rank0:
        saved = _read_choices(file)
        if saved and saved["made_on"] == made_on:
            tuning.fix_choices(saved["choices"])
        elif saved:
            note(
                f"the kernels are chosen anew, {_differences(saved['made_on'], made_on)}: "
                f"from here on sums may be made in another order than before, and the run is not bit for bit what it "
                f"would have been there"
            )
        measure()
    shared = process_group.broadcast_object({"made_on": made_on, "choices": tuning.used_choices()})
    if shared["made_on"] == made_on:
        tuning.fix_choices(shared["choices"])
    if world.local_rank == 0 and not world.is_rank0:
        measure()
    for rank, other in enumerate(process_group.gather_objects(made_on)):
        if other != shared["made_on"]:
            note(
                f"rank {rank} chooses its kernels for itself, {_differences(shared['made_on'], other)}: "
                f"the run repeats bit for bit only where each rank meets the same GPU again"
            )
    content = json.dumps(shared, indent=1, sort_keys=True).encode()
    if error := process_group.run_on_rank0(lambda: write_whole(file, content)):
        raise UserError(error)
    return dict(shared["choices"])


def _read_choices(file: Path) -> Any:
    """The content of ``file``; without an origin where it is damaged, None where there is none."""
    try:
        saved = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        saved = {}
    return {"made_on": {}, "choices": {}} | saved


def _differences(was: dict[str, str], now: dict[str, str]) -> str:
    changed = [key for key in now if was.get(key) != now[key]]
    return ", ".join(f"{key} {was.get(key, 'unknown')} -> {now[key]}" for key in changed)


def describe_attention(choices: tuning.Choices) -> str:
    """Which implementations of attention were chosen, to be added to the choice of kernels; empty without a choice."""
    names = sorted({choice for choice in choices.values() if isinstance(choice, str)})
    fastest = " and ".join(ATTENTION[name] for name in names)
    return f"; attention by {fastest}, measured as the fastest here" if names else ""


def measure_tiles(config: Config, vocab_size: int, batch: Batch) -> None:
    """One forward and backward pass of the run's model cut to one layer, measuring tiles for shapes that are new."""
    short = config.model_copy(update={"model": config.model.model_copy(update={"layers": 1})})
    objective = build_objective(short, vocab_size).to(batch["tokens"].device, DTYPES[config.precision.name])
    with kernels.measuring_tiles():
        torch.stack([total for total, _ in objective(batch).values()]).sum().backward()
