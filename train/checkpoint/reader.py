"""Checkpoints on disk, verified before use and readable at any world size and ZeRO stage.

A checkpoint is a folder ``step_<n>`` with one safetensors file a rank and a manifest. A file holds *pieces*: contiguous
ranges of flattened parameters (fp32 weights or moments), as its rank had them. The manifest says which element lies
where, so any world and stage reads just the slices it needs, without a conversion. ``train.checkpoint.writer`` writes
checkpoints.

A checkpoint whose files differ from its manifest in size or hash, or whose manifest is damaged, is reported and never
read; the one before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint import manifest
from train.checkpoint.mirror import Mirror
from train.checkpoint.pieces import PieceTable, pieces_in_file
from train.checkpoint.staging import tensor_name
from train.distributed import process_group
from train.distributed.param_shard import ShardedState
from train.errors import UserError
from train.state.train_state import TrainState
from train.util.io import sha256_of, write_whole
from train.util.reading import reading
from train.util.run_layout import checkpoint_name

MAPPED_BYTES, MOST_OPEN = 256 << 20, 64
"""Of the files that a reader holds open: bytes read of them, after which they are closed, and their number."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def progress(self) -> TrainState:
        """The state of training when it was saved."""
        with reading(self.path / manifest.MANIFEST, "Remove this checkpoint: the one before it is used then"):
            return TrainState.from_dict(self.manifest["progress"])

    @property
    def val_loss(self) -> float | None:
        """The held-out loss measured at this very step, else None."""
        return self.manifest["val_loss"]

    @property
    def digest(self) -> str:
        """A hash that identifies its content: of the manifest, which has the hashes of all files."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def damage(self, share: slice = slice(None)) -> str | None:
        """The damage of its files (those of ``share``, sorted by name), or None. Reads and hashes every byte."""
        for name, entry in sorted(self.manifest["files"].items())[share]:
            file = self.path / name
            try:
                size = file.stat().st_size
                if size != entry["size"]:
                    return f"{name} has {size} bytes, not {entry['size']}"
                if sha256_of(file) != entry["sha256"]:
                    return f"{name} does not have the hash it was written with"
                if mismatch := _content_mismatch(file, pieces_in_file(self.manifest, name)):
                    return f"{name} {mismatch}"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
        return None

    def reader(self, keep_open: bool = False) -> CheckpointReader:
        """Read slices of parameters; with ``keep_open`` also once the checkpoint is deleted."""
        return CheckpointReader(self, keep_open)


def _content_mismatch(file: Path, pieces: Iterable[list[Any]]) -> str | None:
    """How the tensors of a file differ from its manifest's ``pieces``, or None. Raises OSError if it cannot be read.

    A matching hash is not enough: file and manifest may both come from somebody else. Nothing is ever unpickled.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        return f"is no safetensors file ({error})"
    except (FileNotFoundError, RuntimeError) as error:
        # The run may drop the checkpoint meanwhile. safetensors opens the file first, and its FileNotFoundError has no
        # errno; torch then maps it and raises RuntimeError.
        if file.exists():
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
    for kind, name, start, numel in pieces:
        tensor = tensor_name(kind, name, start)
        if shapes.get(tensor) != [numel]:
            return f"does not hold {tensor} as its manifest says"
    return None


class CheckpointReader:
    """Reads slices of flattened parameters from the pieces that they were written in."""

    def __init__(self, checkpoint: Checkpoint, keep_open: bool) -> None:
        """Opens every file now with ``keep_open``, else those that are read, when they are."""
        self.path = checkpoint.path
        self.files = {n: self._open(n) for n in checkpoint.manifest["files"]} if keep_open else {}
        self.pieces = PieceTable(checkpoint.manifest)
        self.kinds: dict[str, list[str]] = {}
        """Kinds (weight, moments) of each parameter."""
        for name, kind in self.pieces:
            self.kinds.setdefault(name, []).append(kind)
        self._recent: dict[str, Any] = {}
        self._mapped = 0  # bytes that were read of those

    def _open(self, file: str) -> Any:
        return safe_open(self.path / file, framework="pt")

    def _opened(self, file: str, nbytes: int) -> Any:
        """A file that is about to be read, opened anew at most once in MAPPED_BYTES.

        What was read of a file that stays open stays in memory, since it is mapped: a rank that resumes would hold all
        of its state twice. But every opening parses the file's header, and asks a file server.
        """
        if file in self.files:
            return self.files[file]
        if self._mapped > MAPPED_BYTES or len(self._recent) >= MOST_OPEN:
            self._recent, self._mapped = {}, 0
        self._mapped += nbytes
        if file not in self._recent:
            self._recent[file] = self._open(file)
        return self._recent[file]

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter: (numel,) float32."""
        end, parts = start + numel, []
        for first, length, file in self.pieces.overlapping(name, kind, start, end):
            low, high = max(start, first), min(end, first + length)
            if low < high:
                opened = self._opened(file, 4 * (high - low))
                parts.append(opened.get_slice(tensor_name(kind, name, first))[low - first : high - first])
        held = sum(part.numel() for part in parts)
        if held != numel:
            raise UserError(
                f"{self.path} holds {held} of the elements {start} to {end} of {name} ({kind}): it was not saved by "
                "this program. Remove this checkpoint: the one before it is used then"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], dict[int, str]]:
    """The checkpoints of a folder with a whole manifest, oldest first; and the damage of the others, by step."""
    whole, damaged = manifest.read_manifests(folder)
    return [Checkpoint(folder / checkpoint_name(values["progress"]["step"]), values) for values in whole], damaged


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, oldest first."""
    return list_checkpoints(folder)[0]


def find_newest(
    folder: Path, world: process_group.DistContext, note: Callable[[str], None], mirror: Mirror | None = None
) -> Checkpoint | None:
    """The newest undamaged checkpoint, local or in the mirror; one in the mirror is fetched first. A collective.

    Each rank hashes its share of the files; all return the same. A copy in the mirror is taken if it is newer or the
    local one is damaged. Raises UserError if there is no local one and the mirror, which may have one, cannot be read.
    """
    mirror_errors: list[str] = []
    for name, values, remote in process_group.broadcast_object(
        _candidates(folder, note, mirror, mirror_errors) if world.is_rank0 else None
    ):
        checkpoint = Checkpoint(folder / name, values)
        share = slice(world.rank, None, world.size)
        if remote and mirror:
            damage = _fetch_from_mirror(checkpoint, world, mirror, mirror_errors)
        else:
            damage = next((d for d in process_group.gather_objects(checkpoint.damage(share)) if d), None)
        if damage is None:
            if mirror:
                mirror.enqueue(name)
            return checkpoint
        note(f"{name}{' in the mirror' if remote else ''} is damaged and is not used: {damage}")
    if error := process_group.broadcast_object("; ".join(mirror_errors)):
        raise UserError(f"no checkpoint is here, and {error}. Mend that, or begin anew without save_mirror")
    return None


def _candidates(
    folder: Path, note: Callable[[str], None], mirror: Mirror | None, mirror_errors: list[str]
) -> list[tuple[str, dict[str, Any], bool]]:
    """Rank 0: (name, manifest, whether in the mirror) of all checkpoints, newest first, a local one before its copy."""
    whole, damaged = list_checkpoints(folder)
    for step, damage in damaged.items():
        note(f"{checkpoint_name(step)} is damaged and is not used: {damage}")
    local, remote = [(c.path.name, c.manifest, False) for c in whole], []
    try:
        copies = mirror.manifests() if mirror else {}
        remote = [(checkpoint_name(step), values, True) for step, values in copies.items()]
    except OSError as error:
        note(str(error))
        mirror_errors.append(str(error))
    with contextlib.suppress(OSError):
        latest = (folder / "latest").read_text("utf-8", errors="replace")
        if latest not in {name for name, *_ in local}:
            note(f"latest says {latest[:40]!r}, which is no whole checkpoint: the newest whole one is used")
    return sorted([*local, *remote], key=lambda c: (c[1]["progress"]["step"], not c[2]), reverse=True)


def _fetch_from_mirror(
    checkpoint: Checkpoint, world: process_group.DistContext, mirror: Mirror, mirror_errors: list[str]
) -> str | None:
    """Fetch a checkpoint from the mirror, atomically; returns its damage, or None. A collective."""
    temporary = checkpoint.path.with_name(f".{checkpoint.path.name}.fetching")
    fetched = Checkpoint(temporary, checkpoint.manifest)

    def make_folder() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def publish() -> None:
        write_whole(temporary / manifest.MANIFEST, manifest.to_bytes(checkpoint.manifest))
        if checkpoint.path.exists():
            shutil.rmtree(checkpoint.path)
        temporary.rename(checkpoint.path)

    if not (error := process_group.run_on_rank0(make_folder)):
        mine = mirror.fetch(checkpoint.path.name, checkpoint.manifest, temporary)
        error = next((e for e in process_group.gather_objects(mine) if e), None)
    if error:
        mirror_errors.append(f"{checkpoint.path.name} could not be fetched: {error}")
        return error
    mine = fetched.damage(slice(world.rank, None, world.size))
    return next((d for d in process_group.gather_objects(mine) if d), None) or process_group.run_on_rank0(publish)


def restore(checkpoint: Checkpoint, engine: ShardedState) -> None:
    """Fill the engine with a checkpoint's weights, moments and loss scale, at the engine's world size and stage."""
    ours = {name: list(shape) for name, shape in engine.shapes.items()}
    if ours != checkpoint.manifest["shapes"]:
        raise UserError(
            f"{checkpoint.path} holds another model: {_first_difference(checkpoint.manifest['shapes'], ours)}. "
            "Give the old model.* to go on with it, or another run.name to start anew"
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
