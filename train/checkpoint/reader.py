"""Checkpoints: complete or absent, and free of the stage and world size that wrote them.

A checkpoint is a folder ``step_<n>`` of one safetensors file a rank, holding that rank's pieces (flat runs of a parameter's fp32
weights or moments), and a manifest that says which element lies where. Any world and any ZeRO stage reads from it the slices it
needs; there is no conversion. ``train.checkpoint.writer`` writes them.

A file that does not have the size and hash of the manifest is never read, nor is anything where the manifest does not have its own:
the checkpoint before it is taken instead, and that is said.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint import manifest
from train.checkpoint.mirror import Mirror
from train.checkpoint.staging import tensor_name
from train.distributed import process_group
from train.distributed.param_shard import ShardedState
from train.errors import UserError
from train.state.train_state import TrainState
from train.util.io import sha256_of, write_whole
from train.util.run_layout import checkpoint_name


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def progress(self) -> TrainState:
        """How far the run had come."""
        return TrainState.from_dict(self.manifest["progress"])

    @property
    def val_loss(self) -> float | None:
        """The held-out loss measured at this very step, if it was."""
        return self.manifest["val_loss"]

    @property
    def digest(self) -> str:
        """What tells its content from that of any other: a hash of its manifest, which has those of its files."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

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
                if mismatch := _content_mismatch(file, entry["pieces"]):
                    return f"{name} {mismatch}"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
        return None

    def reader(self) -> CheckpointReader:
        """Reads slices of parameters from it."""
        return CheckpointReader(self)


def _content_mismatch(file: Path, pieces: list[list[Any]]) -> str | None:
    """How the tensors of a file differ from its manifest's ``pieces``, or None. Raises OSError if it cannot be read.

    A matching hash is not enough: file and manifest may both come from somebody else. Nothing is ever unpickled.
    """
    try:
        with safe_open(file, framework="pt") as held:
            shapes = {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        return f"is no safetensors file ({error})"
    except (FileNotFoundError, RuntimeError) as error:
        # The run may drop the checkpoint meanwhile. safetensors opens the file first, and its FileNotFoundError has no
        # errno; torch then maps it and raises RuntimeError.
        if file.exists():
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
    wrong = (
        tensor_name(kind, name, start)
        for kind, name, start, numel in pieces
        if shapes.get(tensor_name(kind, name, start)) != [numel]
    )
    return next((f"does not hold {name} as its manifest says" for name in wrong), None)


class CheckpointReader:
    """Slices of the flattened parameters of a checkpoint, whatever pieces they were written in."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files = {n: safe_open(checkpoint.path / n, framework="pt") for n in checkpoint.manifest["files"]}
        self.pieces: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file, entry in checkpoint.manifest["files"].items():
            for kind, name, start, numel in entry["pieces"]:
                self.pieces.setdefault((name, kind), []).append((start, numel, file))
        self.kinds: dict[str, list[str]] = {}
        for (name, kind), places in self.pieces.items():
            places.sort()
            self.kinds.setdefault(name, []).append(kind)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter: (numel,) float32."""
        places, end, found = self.pieces[name, kind], start + numel, []
        at = max(0, bisect_right([p[0] for p in places], start) - 1)
        for first, length, file in places[at:]:
            if first >= end:
                break
            low, high = max(start, first), min(end, first + length)
            if low < high:
                found.append(self.files[file].get_slice(tensor_name(kind, name, first))[low - first : high - first])
        whole = torch.cat(found) if len(found) != 1 else found[0]
        if whole.numel() != numel:
            raise ValueError(f"{name} ({kind}) holds {whole.numel()} of the elements {start} to {end}")
        return whole


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], dict[int, str]]:
    """The checkpoints of a folder whose manifest is whole, oldest first; and of those where it is not, by step, what is wrong."""
    whole, damaged = manifest.read_manifests(folder)
    return [Checkpoint(folder / checkpoint_name(values["progress"]["step"]), values) for values in whole], damaged


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, oldest first."""
    return list_checkpoints(folder)[0]


def find_newest(
    folder: Path, world: process_group.DistContext, note: Callable[[str], None], mirror: Mirror | None = None
) -> Checkpoint | None:
    """The newest one that is whole, here or, if it is newer or the one here is damaged, in the mirror, from where it is fetched.

    Every rank gets the same, having hashed its share of the files. A collective. Raises UserError where there is none here and the
    mirror, which may have one, cannot be read.
    """
    lost: list[str] = []
    for name, values, remote in process_group.broadcast_object(
        _candidates(folder, note, mirror, lost) if world.is_rank0 else None
    ):
        checkpoint = Checkpoint(folder / name, values)
        share = slice(world.rank, None, world.size)
        if remote and mirror:
            damage = _fetch_from_mirror(checkpoint, world, mirror, lost)
        else:
            damage = next((d for d in process_group.gather_objects(checkpoint.damage(share)) if d), None)
        if damage is None:
            if mirror:
                mirror.enqueue(name)
            return checkpoint
        note(f"{name}{' in the mirror' if remote else ''} is damaged and is not used: {damage}")
    if error := process_group.broadcast_object("; ".join(lost)):
        raise UserError(f"no checkpoint is here, and {error}. Mend that, or begin anew without save_mirror")
    return None


def _candidates(
    folder: Path, note: Callable[[str], None], mirror: Mirror | None, lost: list[str]
) -> list[tuple[str, dict[str, Any], bool]]:
    """Rank 0: the name, the manifest and whether it is in the mirror, of all that may be used, the best first."""
    whole, damaged = list_checkpoints(folder)
    for step, damage in damaged.items():
        note(f"{checkpoint_name(step)} is damaged and is not used: {damage}")
    here, there = [(c.path.name, c.manifest, False) for c in whole], []
    try:
        there = [(checkpoint_name(step), values, True) for step, values in mirror.manifests().items()] if mirror else []
    except OSError as error:
        note(str(error))
        lost.append(str(error))
    with contextlib.suppress(OSError):
        said = (folder / "latest").read_text(errors="replace")
        if said not in {name for name, *_ in here}:
            note(f"latest says {said[:40]!r}, which is no whole checkpoint")
    return sorted([*here, *there], key=lambda c: (c[1]["progress"]["step"], not c[2]), reverse=True)


def _fetch_from_mirror(
    checkpoint: Checkpoint, world: process_group.DistContext, mirror: Mirror, lost: list[str]
) -> str | None:
    """Bring a checkpoint here from the mirror, whole or not at all: what is wrong with it, or None. A collective."""
    aside = checkpoint.path.with_name(f".{checkpoint.path.name}.fetching")
    coming = Checkpoint(aside, checkpoint.manifest)

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def end() -> None:
        write_whole(aside / manifest.MANIFEST, manifest.to_bytes(checkpoint.manifest))
        if checkpoint.path.exists():
            shutil.rmtree(checkpoint.path)
        aside.rename(checkpoint.path)

    if not (error := process_group.run_on_rank0(begin)):
        mine = mirror.fetch(checkpoint.path.name, checkpoint.manifest, aside)
        error = next((e for e in process_group.gather_objects(mine) if e), None)
    if error:
        lost.append(f"{checkpoint.path.name} could not be fetched: {error}")
        return error
    mine = coming.damage(slice(world.rank, None, world.size))
    return next((d for d in process_group.gather_objects(mine) if d), None) or process_group.run_on_rank0(end)


def restore(checkpoint: Checkpoint, engine: ShardedState) -> None:
    """Fill the engine with a checkpoint's weights, moments and loss scale, at this world's size and stage."""
    ours = {name: list(shape) for name, shape in engine.shapes.items()}
    if ours != checkpoint.manifest["shapes"]:
        raise UserError(
            f"{checkpoint.path} holds another model: {_first_difference(checkpoint.manifest['shapes'], ours)}"
        )
    reader = checkpoint.reader()
    engine.load(
        lambda piece, kind: reader.read(piece.name, kind, piece.start, piece.numel),
        reader.kinds,
        checkpoint.progress.updates,
    )
    engine.load_scalars(checkpoint.manifest["scalars"])


def _first_difference(theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> str:
    name = next(n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n))
    return f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
