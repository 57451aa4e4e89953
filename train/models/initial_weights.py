"""Weights of a new model, any range of any parameter: a function of (seed, name of the parameter, block) alone.

So a rank draws its share and nothing else, and every world size, ZeRO stage and device begins with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from train.distributed import heartbeat
from train.models.layers import Norm
from train.util import seeding

BLOCK = 1 << 21
"""Elements that one generator draws: few enough that the end of a share is soon found, and enough to draw quickly."""


ReadWeights = Callable[[str, int, int], Tensor]
"""Reads elements [start, start + numel) of a flattened parameter from (name, start, numel): (numel,) floating point."""


class _Start(NamedTuple):
    """How a parameter starts: normal with a deviation (one, or one per row), or where that is None with a constant."""

    shape: torch.Size
    std: float | Tensor | None
    constant: float


class InitialWeights:
    """The weights that a module starts with: normal(0, init_std) of the module that owns them, biases 0, norms 1."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        """``module`` may be on ``meta``: only names, shapes and deviations are read, and they are read now."""
        self.seed = seed
        self.starts = dict(_starts(module))

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter: (numel,) float32, on the CPU."""
        shape, std, constant = self.starts[name]
        if std is None:
            return torch.full((numel,), constant)
        weights = torch.from_numpy(draw_normal(self.seed, name, shape.numel(), slice(start, start + numel)))
        if isinstance(std, float):
            return weights.mul_(std)
        rows = torch.arange(start, start + numel) // (shape.numel() // shape[0])
        return weights.mul_(std.flatten()[rows])


def draw_normal(seed: int, name: str, size: int, share: slice) -> np.ndarray:
    """Elements ``share`` (start and stop given) of ``size`` numbers, normal(0, 1) in float32, that belong to ``name``.

    Each block has a generator of its own, in which a number is found by drawing those before it in the block. The first
    block has that of the name alone, from which all of a parameter was once drawn: smaller ones are as they were.
    """
    drawn = np.empty(share.stop - share.start, np.float32)
    for first in range(share.start // BLOCK * BLOCK, min(share.stop, size), BLOCK):
        heartbeat.touch()  # a large model takes minutes
        low, high = max(share.start, first), min(share.stop, first + BLOCK, size)
        block = [first // BLOCK] if first else []
        numbers = seeding.generator(seed, "init", name, *block).standard_normal(high - first, np.float32)
        drawn[low - share.start : high - share.start] = numbers[low - first :]
    return drawn


def _starts(module: nn.Module) -> Iterator[tuple[str, _Start]]:
    """Name and start of every parameter; of a shared one by its first name, as ``named_parameters`` has it."""
    done: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            name = f"{path}.{leaf}" if path else leaf
            if leaf.startswith("bias"):
                yield name, _Start(parameter.shape, None, 0.0)
            elif isinstance(owner, Norm):
                yield name, _Start(parameter.shape, None, 1.0)
            else:
                std = owner.init_std
                yield name, _Start(parameter.shape, std if isinstance(std, Tensor) else float(std), 0.0)


@torch.no_grad()
def init_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a whole module with its ``InitialWeights``. Parameters on ``meta`` are left alone."""
    initial = InitialWeights(module, seed)
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(initial.read(name, 0, parameter.numel()).view_as(parameter))
