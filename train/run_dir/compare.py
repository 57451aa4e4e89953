"""Comparison of two runs up to a step, bit for bit: metrics, and every weight and moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from train.checkpoint.reader import Checkpoint, CheckpointReader, complete
from train.errors import UserError
from train.util.io import read_records, steps_of
from train.util.run_layout import RunDir

COMPARED = ("loss", "grad_norm", "lr", "tokens", "data_hash")


@dataclass(frozen=True)
class Comparison:
    """Result for one subject: how many items were compared, and the first that differs, in words, if any does."""

    subject: str
    compared: int
    difference: str | None


def compare(ours: Path, theirs: Path, step: int) -> list[Comparison]:
    """Compare two runs' folders up to ``step``. Raises UserError where one has no checkpoint of that step."""
    return [*compare_lines(ours, theirs, step), *_of_states(checkpoint_of(ours, step), checkpoint_of(theirs, step))]


def compare_lines(ours: Path, theirs: Path, step: int) -> list[Comparison]:
    """Compare the metrics of two runs up to ``step``, number by number; a step that only one of them has is a
    difference.
    """
    lines = (_lines_by_step(ours, step), _lines_by_step(theirs, step))
    return [_of_lines(key, *lines) for key in COMPARED]


def _lines_by_step(folder: Path, step: int) -> dict[int, dict]:
    records = steps_of(read_records(RunDir(folder).metrics))
    return {of_step: record for of_step, record in records.items() if of_step <= step}


def checkpoint_of(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises UserError where there is none."""
    for checkpoint in complete(RunDir(folder).checkpoints):
        if checkpoint.progress.step == step:
            return checkpoint
    raise UserError(f"{folder} has no complete checkpoint of step {step}")


def _of_lines(key: str, ours: dict[int, dict], theirs: dict[int, dict]) -> Comparison:
    steps = sorted({*ours, *theirs})
    values = ((step, ours.get(step, {}).get(key), theirs.get(step, {}).get(key)) for step in steps)
    difference = next((f"step {step}: {a} and {b}" for step, a, b in values if a is None or a != b), None)
    return Comparison(key, len(steps), difference)


def _of_states(ours: Checkpoint, theirs: Checkpoint) -> list[Comparison]:
    readers = [ours.reader(), theirs.reader()]
    keys = readers[0].pieces.keys() | readers[1].pieces.keys()
    kinds = sorted({kind for _, kind in keys}, reverse=True)
    comparisons = []
    for kind in kinds:
        names = sorted(name for name, k in keys if k == kind)
        difference = None
        for name in names:
            missing = any((name, kind) not in reader.pieces for reader in readers)
            whole = [] if missing else [_whole_tensor(reader, name, kind) for reader in readers]
            if missing or not torch.equal(*whole):
                difference = difference or f"{name}: {'missing in one' if missing else _apart(*whole)}"
        comparisons.append(Comparison(f"tensors of {kind}", len(names), difference))
    return comparisons


def _whole_tensor(reader: CheckpointReader, name: str, kind: str) -> torch.Tensor:
    return reader.read(name, kind, 0, reader.pieces.numel(name, kind))


def _apart(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"{a.numel()} and {b.numel()} elements"
    return f"apart by up to {(a - b).abs().max():.3g}"
