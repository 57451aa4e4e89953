"""Whether two runs are the same up to a step: their metrics, and every weight and moment of a checkpoint, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from train.checkpoint.reader import Checkpoint, complete
from train.errors import UserError
from train.util.io import read_records
from train.util.run_layout import RunDir

COMPARED = ("loss", "grad_norm", "lr", "tokens", "data_hash")


@dataclass(frozen=True)
class Comparison:
    """How many of some things were compared, and the first that differs, in words, if any does."""

    subject: str
    compared: int
    difference: str | None


def compare(ours: Path, theirs: Path, step: int) -> list[Comparison]:
    """What two runs' folders hold up to ``step``, of which both have a checkpoint. Raises UserError where one has none."""
    return [*compare_lines(ours, theirs, step), *_of_states(checkpoint_of(ours, step), checkpoint_of(theirs, step))]


def compare_lines(ours: Path, theirs: Path, step: int) -> list[Comparison]:
    """The lines of two runs' metrics up to ``step``, number by number: one that only one of them has is a difference, too."""
    lines = [
        {r["step"]: r for r in read_records(RunDir(folder).metrics) if r["step"] <= step} for folder in (ours, theirs)
    ]
    return [_of_lines(key, *lines) for key in COMPARED]


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
    kinds = sorted({kind for reader in readers for _, kind in reader.pieces}, reverse=True)
    found = []
    for kind in kinds:
        names = sorted({name for reader in readers for name, k in reader.pieces if k == kind})
        difference = None
        for name in names:
            missing = any((name, kind) not in reader.pieces for reader in readers)
            whole = [] if missing else [r.read(name, kind, 0, sum(p[1] for p in r.pieces[name, kind])) for r in readers]
            if missing or not torch.equal(*whole):
                difference = difference or f"{name}: {'missing in one' if missing else _apart(*whole)}"
        found.append(Comparison(f"tensors of {kind}", len(names), difference))
    return found


def _apart(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"{a.numel()} and {b.numel()} elements"
    return f"apart by up to {(a - b).abs().max():.3g}"
