"""The held-out loss, exactly: the same number for any count of workers."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from train import dist
from train.batch import Batch, Losses, to_device
from train.data.loader import EvalLoader
from train.errors import Stopped


@dataclass(frozen=True)
class Evaluation:
    """What the held-out split says of a model."""

    nats: float
    """Loss summed over every held-out place."""
    places: int
    bytes_per_place: float
    """Bytes of text behind a trained place, over the whole split."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.places

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text: comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_place


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], Losses], held_out: EvalLoader, world: dist.World, should_stop: Callable[[], bool]
) -> tuple[float, int]:
    """(nats, places) over all groups of all ranks. A collective.

    Each group's sum has its own place in one table, which is then added up in one order: who computed which changes nothing.
    Raises Stopped on every rank once any rank is asked to stop.
    """
    sums, counts = [0.0] * held_out.groups, [0.0] * held_out.groups
    for turn, batch in enumerate(held_out):
        if dist.all_reduce_sum([float(should_stop())])[0]:
            raise Stopped
        total, count = forward(to_device(batch, world.device))["loss"]
        number = world.rank + turn * world.size
        if number < held_out.groups:
            sums[number], counts[number] = float(total), float(count)
    table = dist.all_reduce_sum([*sums, *counts])
    return math.fsum(table[: held_out.groups]), int(math.fsum(table[held_out.groups :]))


def gzip_bits_per_byte(text: bytes) -> float:
    """What ``gzip -9`` needs for the same bytes: the baseline that anyone can check."""
    return 8 * len(gzip.compress(text, 9)) / max(len(text), 1)
