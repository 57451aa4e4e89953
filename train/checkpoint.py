"""Checkpoints: complete or absent, and free of the stage and world size that wrote them.

A checkpoint is a folder ``step_<n>`` of one safetensors file a rank, holding that rank's pieces (flat runs of a parameter's fp32
weights or moments), and a manifest that says which element lies where. Any world and any ZeRO stage reads from it the slices it
needs; there is no conversion. ``train.saving`` writes them.

A file that does not have the size and hash of the manifest is never read, nor is anything where the manifest does not have its own:
the checkpoint before it is taken instead, and that is said.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train import dist, manifest
from train.data.files import sha256_of
from train.errors import UserError
from train.pieces import Stateful
from train.progress import Progress
from train.snapshot import key


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """How far the run had come."""
        return Progress.from_dict(self.manifest["progress"])

    @property
    def val_loss(self) -> float | None:
        """The held-out loss measured at this very step, if it was."""
        return self.manifest["val_loss"]

    def damage(self, share: slice = slice(None)) -> str | None:
        """What is wrong with its files (those of ``share``), or None. Reads and hashes every byte."""
        for name, entry in sorted(self.manifest["files"].items())[share]:
            file = self.path / name
            try:
                size = file.stat().st_size
                if size != entry["size"]:
                    return f"{name} has {size} bytes, not {entry['size']}"
                if sha256_of(file) != entry["sha256"]:
                    return f"{name} does not have the hash it was written with"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None

    def reader(self) -> Reader:
        """Reads slices of parameters from it."""
        return Reader(self)


class Reader:
    """Slices of the flattened parameters of a checkpoint, whatever pieces they were written in."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files = {n: safe_open(checkpoint.path / n, framework="pt") for n in checkpoint.manifest["files"]}
        self.where: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file, entry in checkpoint.manifest["files"].items():
            for kind, name, start, numel in entry["pieces"]:
                self.where.setdefault((name, kind), []).append((start, numel, file))
        for places in self.where.values():
            places.sort()

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter: (numel,) float32."""
        places, end, found = self.where[name, kind], start + numel, []
        at = max(0, bisect_right([p[0] for p in places], start) - 1)
        for first, length, file in places[at:]:
            if first >= end:
                break
            low, high = max(start, first), min(end, first + length)
            if low < high:
                found.append(self.files[file].get_slice(key(kind, name, first))[low - first : high - first])
        whole = torch.cat(found) if len(found) != 1 else found[0]
        if whole.numel() != numel:
            raise ValueError(f"{name} ({kind}) holds {whole.numel()} of the elements {start} to {end}")
        return whole


def inventory(folder: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The checkpoints of a folder whose manifest is whole, oldest first, and what is wrong with those where it is not."""
    whole, damaged = [], {}
    for path in folder.glob("step_*"):
        try:
            whole.append(Checkpoint(path, manifest.read(path)))
        except manifest.Damaged as damage:
            damaged[path] = str(damage)
    return sorted(whole, key=lambda c: c.progress.step), damaged


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, oldest first."""
    return inventory(folder)[0]


def newest(folder: Path, world: dist.World, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest one that is whole; every rank gets the same, having hashed its share of the files. A collective."""
    found, damaged = inventory(folder)
    for path, damage in damaged.items():
        note(f"{path.name} is damaged and is not used: {damage}")
    for checkpoint in reversed(found):
        mine = checkpoint.damage(slice(world.rank, None, world.size))
        found_damage = [d for d in dist.gather_objects(mine) if d]
        if not found_damage:
            return checkpoint
        note(f"{checkpoint.path.name} is damaged and is not used: {found_damage[0]}")
    return None


def restore(checkpoint: Checkpoint, engine: Stateful) -> None:
    """Fill the engine with a checkpoint's weights, moments and loss scale, at this world's size and stage."""
    ours = {name: list(shape) for name, shape in engine.shapes.items()}
    if ours != checkpoint.manifest["shapes"]:
        raise UserError(f"{checkpoint.path} holds another model: {_difference(checkpoint.manifest['shapes'], ours)}")
    reader = checkpoint.reader()
    engine.load(
        lambda piece, kind: reader.read(piece.name, kind, piece.start, piece.numel),
        checkpoint.manifest["kinds"],
        checkpoint.progress.updates,
    )
    engine.load_scalars(checkpoint.manifest["scalars"])


def _difference(theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> str:
    name = next(n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n))
    return f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
