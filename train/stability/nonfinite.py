"""Non-finite models: find the first layer with bad output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


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
