"""A dry run: one rank of a run's own engine in a world of any size, with its collectives left out and nothing computed.

The objective, DeepSpeed and the optimizer are those of the run, on tensors without memory (``dry_mode``), and the
process group is torch's fake one. So what is allocated when, at any stage and precision, is not modelled but logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from kernels import dispatch
from train.batch import Batch
from train.config.schema import Config
from train.distributed import heartbeat, process_group
from train.distributed.process_group import DistContext
from train.engine import engine as engine_module
from train.engine import short_collectives, zero_layout
from train.engine.ds_config import EngineInventory
from train.engine.ds_patches import forget_process_groups
from train.planning.allocations import Peak
from train.planning.batches import full_batch
from train.planning.dry_mode import Collective, DryMode, Work
from train.run import build_engine

STEPS = 2
"""The first makes moments and, at stage 3, learns the order of the weights; the second is as all that follow."""
MOST_MICRO_BATCHES = 2
"""Of a dry step: the memory of further ones is that of the second, and their work that of the first."""


@dataclass(frozen=True)
class PlannedRows:
    """Rows of a forward pass and passes per step of a rank, as an engine reads them from a loader."""

    micro: int
    micro_batches: int


@dataclass(frozen=True)
class DryRun:
    """All that one rank of a configuration allocates, computes and sends in a step."""

    start: Peak
    """Of building the engine."""
    step: Peak
    """Of a step after the first."""
    resting: int
    """Bytes that live between steps."""
    work: dict[Work, int]
    """Operator calls of a step, and how often each was made."""
    collectives: list[Collective]
    """Of a step, in their order."""
    params: int
    flops_per_token: float
    rows: PlannedRows


def rows_of(config: Config, world_size: int) -> PlannedRows:
    """The micro-batch and the passes of a step of the rank that has most rows."""
    share = -(-config.batch.global_ // world_size)
    micro = config.batch.micro or share
    return PlannedRows(micro, -(-share // micro))


def vocabulary(config: Config) -> int:
    """Tokens of the tokenizer, as far as the configuration says; a corpus of characters has its own number."""
    given = config.data.tokenizer.vocab_size or config.model.vocab_size or 257
    return min(given, config.model.vocab_size or given)


def dry_run(config: Config, world_size: int, device: str = "cpu") -> DryRun:
    """Make ``STEPS`` steps of rank 0 of ``world_size``, for a ``device`` "cpu" or "cuda", whatever this machine has.

    The precision must be chosen. This process gets a process group of its own for the time, so it must have none.
    """
    rows, mode = rows_of(config, world_size), DryMode(gloo=device == "cpu")
    made: Any = PlannedRows(rows.micro, min(rows.micro_batches, MOST_MICRO_BATCHES))
    tokens = {"loss": 1, "next_loss": 1}
    with _pretending(mode, config, world_size, device):
        world = DistContext(0, world_size, 0, torch.device("cpu"))
        engine, objective = build_engine(config, vocabulary(config), world, made, fill=lambda engine: None)
        _answer_owners(engine, config.zero.stage, world_size)
        _name_parts(mode, engine)
        built = mode.log.clock
        began = 0
        for _ in range(STEPS):
            mode.work.clear()
            mode.collectives.clear()
            began = mode.log.clock
            mode.phase = "data"
            batches = [_batch(mode, config, rows.micro) for _ in range(made.micro_batches)]
            engine.train_step(batches, tokens, config.optimizer.lr, partial(_name_gradients, mode, began))
            del batches
            _name_parts(mode, engine)
        end = mode.log.clock
        resting = sum(allocation.nbytes for allocation in mode.log.living())
        params = sum(shape.numel() for shape in engine.shapes.values())
        flops = objective.flops_per_token(config.batch.seq_len)
    peaks = mode.log.peak(0, built), mode.log.peak(began, end)
    return DryRun(*peaks, resting, dict(mode.work), list(mode.collectives), params, flops, rows)


@contextlib.contextmanager
def _pretending(mode: DryMode, config: Config, world_size: int, device: str) -> Iterator[None]:
    """Context in which a world of ``world_size`` ranks on ``device`` seems to be there, and ``mode`` is active."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    settings, apply, gather = engine_module.deepspeed_config, nn.Module._apply, process_group.gather_objects
    deepspeed: Any = engine_module.deepspeed
    initialize = deepspeed.initialize

    def watched(*, model: nn.Module, **options: Any) -> Any:
        _watch(mode, model)  # before DeepSpeed's own hooks are there
        return initialize(model=model, **options)

    def on_device(
        config: Config, micro: int, accumulation: int, inventory: EngineInventory, *, plain: bool
    ) -> dict[str, Any]:
        planned = dataclasses.replace(inventory, device=device)
        return settings(config, micro, accumulation, planned, plain=plain)

    logging.disable(logging.WARNING)  # DeepSpeed's words about a run that is none
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    engine_module.deepspeed_config = on_device
    deepspeed.initialize = watched
    nn.Module._apply = _convert  # type: ignore[method-assign]
    last = min(rows_of(config, world_size).micro_batches, MOST_MICRO_BATCHES) - 1
    heartbeat.on_phase(lambda phase, micro: mode.enter(phase, micro == last))
    kernels = dispatch.assuming_gpu() if device == "cuda" else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(), kernels, short_collectives.in_place_of_deepspeeds(), mode:
            warnings.simplefilter("ignore")  # of addresses, which such tensors do not have
            yield
    finally:
        logging.disable(logging.NOTSET)
        heartbeat.on_phase(None)
        engine_module.deepspeed_config, process_group.gather_objects = settings, gather
        nn.Module._apply = apply  # type: ignore[method-assign]
        deepspeed.initialize = initialize
        process_group.destroy_group()
        forget_process_groups()


def _convert(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` by assignment to ``data``: torch's own swaps tensors, which those without memory refuse."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = function(parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _batch(mode: DryMode, config: Config, rows: int) -> Batch:
    """A full batch, in memory: the shapes of some models depend on its numbers."""
    with _disable_current_modes():
        batch = full_batch(config, rows)
    for tensor in batch.values():
        mode.log.see(tensor, "batch")
    return batch


def _watch(mode: DryMode, objective: nn.Module) -> None:
    """Name each gradient as such when it is complete; DeepSpeed may move it in the same moment."""
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: mode.log.name(p.grad, "gradients"))


def _name_parts(mode: DryMode, engine: engine_module.Engine) -> None:
    """Name what the engine keeps between steps: weights, masters, moments and buffers for gradients."""
    for allocation in mode.log.living():
        allocation.part = "buckets"
    for gradients in zero_layout.gradient_buffers(engine.engine):
        mode.log.name(gradients, "gradients")
    for state in engine.inner.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                mode.log.name(value, "moments")
    for shard in engine.param_shards:
        mode.log.name(shard.holder, "master weights")
    for tensor in [*engine.module.parameters(), *engine.module.buffers()]:
        mode.log.name(getattr(tensor, "ds_tensor", tensor), "weights")


def _name_gradients(mode: DryMode, since: int) -> None:
    """Name what the backward pass has left for the update."""
    for allocation in mode.log.living(since):
        if allocation.part in ("buckets", "activations"):
            allocation.part = "gradients"


def _ranges_of_ranks(shapes: Sequence[torch.Size], own: int, stage: int, world_size: int) -> list[Any]:
    """``matrix_owners.Ranges`` of parameters in one flat tensor, of which each rank has ``own`` elements, as ZeRO cuts.

    Stages 1 and 2 cut the flat tensor, stage 3 every parameter.
    """
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
    first = 0
    for shape in shapes:
        numel = shape.numel()
        share, offset = (-(-numel // world_size), 0) if stage == 3 else (own, first)
        for rank, of_rank in enumerate(ranges):
            begin, end = (min(max(edge - offset, 0), numel) for edge in (rank * share, (rank + 1) * share))
            of_rank.append((begin, end - begin) if end > begin else (0, 0))
        first += numel
    return ranges


def _answer_owners(engine: engine_module.Engine, stage: int, world_size: int) -> None:
    """Have Muon learn from here which matrices other ranks hold, since there are none to ask."""
    known = []
    for flat, matrices in (getattr(engine.inner, "shards", None) or {}).items():
        known.append(_ranges_of_ranks([shape for shape, _ in matrices], flat.numel(), stage, world_size))

    def answer(value: Any) -> list[Any]:
        return next(ranges for ranges in known if ranges[0] == value)

    process_group.gather_objects = answer
