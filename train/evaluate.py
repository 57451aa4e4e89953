"""Evaluation on the held-out split: exact sums, and so the same numbers for any count of workers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.batch import Batch, Losses, to_device
from train.data.loader import EvalLoader, HeldOut
from train.distributed import process_group
from train.errors import Stopped
from train.reporting import metrics

_GZIP = 16 + zlib.MAX_WBITS
"""What zlib calls gzip's format."""

Sums = dict[str, tuple[NDArray[np.float64], int]]
"""By name: a total over the whole split, and the number of targets it is over.

    x_loss, x_accuracy   a sum (of nats, or of right answers)
    confusion            (C, C) counts
    scores               (rows, 2): prediction and target of each row
"""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on a held-out split, from the sums over it."""

    sums: Sums
    bytes: float | None
    """Bytes of text behind the targets, where every token of it was predicted; else None, or 0 of a corpus in which
    only a part of each text is trained.
    """
    by_source: Mapping[str, Evaluation] = field(default_factory=dict)
    """The same of each source of a mixture alone, by its name."""

    @property
    def loss(self) -> float:
        """Mean loss per target: nats, and for scores the squared error."""
        return self._ratio("loss")

    @property
    def perplexity(self) -> float | None:
        """exp(loss) of a model that predicts tokens; None for a classifier."""
        return None if {"confusion", "scores"} & self.sums.keys() else metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text: comparable between tokenizers. None where not every token was predicted."""
        return None if not self.bytes else metrics.bits_per_byte(float(self.sums["loss"][0]), self.bytes)

    def numbers(self) -> dict[str, float]:
        """The metrics by the names of ``metrics.jsonl``."""
        numbers = {f"val_{name}": self._ratio(name) for name in self.sums if name.endswith("loss")}
        if self.bits_per_byte is not None:
            numbers["bits_per_byte"] = self.bits_per_byte
        numbers |= {name: self._ratio(name) for name in self.sums if name.endswith("accuracy")}
        if "confusion" in self.sums:
            numbers |= metrics.classification_metrics(self.sums["confusion"][0])
        if "scores" in self.sums:
            numbers |= metrics.regression_metrics(*self.sums["scores"][0].T)
        for source, evaluation in self.by_source.items():
            numbers |= {f"{name}/{source}": value for name, value in evaluation.numbers().items()}
        return numbers

    def details(self, classes: list[str]) -> dict[str, Any]:
        """Metrics by class and the confusion matrix, for the summary of a classifier; else empty."""
        return metrics.per_class_metrics(self.sums["confusion"][0], classes) if "confusion" in self.sums else {}

    def _ratio(self, name: str) -> float:
        total, count = self.sums[name]
        return float(total) / count if count else math.nan


def evaluate(
    forward: Callable[[Batch], Losses],
    held_out: HeldOut,
    world: process_group.DistContext,
    should_stop: Callable[[], bool],
    whole_text: bool,
) -> Evaluation:
    """Evaluate on a held-out split, that of a mixture by source too. A collective: see ``sum_over``.

    ``whole_text``: every token of the text is predicted.
    """
    parts = {}
    for source, loader in held_out.parts.items():
        sums = sum_over(forward, loader, world, should_stop)
        parts[source] = Evaluation(sums, loader.bytes if whole_text else None)
    if list(parts) == [""]:
        return parts[""]
    parts = {source: part for source, part in parts.items() if part.sums}
    return Evaluation(_add_sums([part.sums for part in parts.values()]), held_out.bytes if whole_text else None, parts)


def _add_sums(parts: list[Sums]) -> Sums:
    """The sums over several splits: totals are added, rows of scores listed one after another."""
    sums: Sums = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        totals = [part[name][0] for part in parts if name in part]
        total = np.concatenate(totals) if name == "scores" else np.sum(totals, axis=0)
        sums[name] = total, sum(part[name][1] for part in parts if name in part)
    return sums


@torch.no_grad()
def sum_over(
    forward: Callable[[Batch], Losses],
    held_out: EvalLoader,
    world: process_group.DistContext,
    should_stop: Callable[[], bool],
) -> Sums:
    """Sum losses and metrics over the split, each rank its share of the groups (fixed sets of rows). A collective.

    Each group has its own row in one table, which is summed in one order: the result does not depend on which rank
    computed a group. Counts are integers, exact in any order, and share a row. Raises Stopped on every rank once any is
    asked to stop.
    """
    tables: dict[str, _GroupSums] = {}
    for turn, batch in enumerate(held_out):
        if process_group.all_reduce_sum([float(should_stop())])[0]:
            raise Stopped
        number = world.rank + turn * world.size
        for name, (total, count) in forward(to_device(batch, world.device)).items():
            table = tables.setdefault(name, _GroupSums(total, held_out.groups))
            if number < held_out.groups:
                table.add(number, total, count)
    flat = np.concatenate([table.flat() for table in tables.values()]) if tables else np.zeros(0)
    whole = np.array(process_group.all_reduce_sum(flat.tolist()))
    sums = {}
    for name, table in tables.items():
        part, whole = np.split(whole, [len(table.flat())])
        sums[name] = table.result(part)
    return sums


class _GroupSums:
    """One metric by group: a row a group, or one row for all where it is a count. The last column counts targets."""

    def __init__(self, like: Tensor, groups: int) -> None:
        self.shape, self.exact = tuple(like.shape), not like.is_floating_point()
        self.lines = np.zeros((1 if self.exact else groups, like.numel() + 1))

    def add(self, group: int, total: Tensor, count: Tensor) -> None:
        values = np.append(total.detach().double().cpu().numpy().ravel(), float(count))
        self.lines[0 if self.exact else group] += values

    def flat(self) -> NDArray[np.float64]:
        return self.lines.ravel()

    def result(self, flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
        lines = flat.reshape(self.lines.shape)
        count, values = int(lines[:, -1].sum()), lines[:, :-1]
        if self.exact or not self.shape:
            return np.array([math.fsum(column) for column in values.T]).reshape(self.shape), count
        rows = values.reshape(-1, self.shape[-1])
        return rows[~np.isnan(rows).any(1)], count


def gzip_bits_per_byte(parts: Iterable[bytes]) -> tuple[float, int]:
    """Bits per byte of ``gzip -9`` on a text that comes in parts, a baseline that anyone can check; and its bytes."""
    packer, size, packed = zlib.compressobj(9, wbits=_GZIP), 0, 0
    for part in parts:
        size += len(part)
        packed += len(packer.compress(part))
    return 8 * (packed + len(packer.flush())) / max(size, 1), size
