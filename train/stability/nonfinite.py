"""Non-finite models: find the first layer with bad output, or reset the weights to step 0."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.distributed.param_shard import MASTER, ParamShard
from train.engine.engine import Engine


@contextlib.contextmanager
def first_nonfinite(module: nn.Module) -> Iterator[list[str]]:
    """Inside, each forward pass of ``module`` adds the name of its first layer with non-finite output, if there is one,
    to the list.
    """
    names: list[str] = []
    clean = True

    def begin(layer: nn.Module, inputs: Any) -> None:
        nonlocal clean
        clean = True

    def check_output(name: str) -> Any:
        def after(layer: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal clean
            if clean and not all(torch.isfinite(t).all() for t in float_tensors(output)):
                clean = False
                names.append(name)

        return after

    hooks = [module.register_forward_pre_hook(begin)]
    hooks += [layer.register_forward_hook(check_output(name)) for name, layer in module.named_modules()]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def float_tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a layer's output, be it a tensor or nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from float_tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from float_tensors(item)


def reset_to_initial(engine: Engine, objective: nn.Module) -> None:
    """Fill the engine with the weights of ``objective``, those of step 0, and with zero moments."""
    weights = {name: p.detach().float().view(-1) for name, p in objective.named_parameters()}
    kinds = {piece.name: list(engine.states(piece)) for piece in engine.param_shards}

    def read(piece: ParamShard, kind: str) -> Tensor:
        first = weights.get(piece.name) if kind == MASTER else None
        return torch.zeros(piece.numel) if first is None else first.narrow(0, piece.start, piece.numel)

    engine.load(read, kinds, updates=0)
