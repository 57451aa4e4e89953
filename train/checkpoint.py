"""Checkpoints: complete or absent, and free of the stage and world size that wrote them.

A checkpoint is a folder ``step_<n>`` of one safetensors file a rank, holding that rank's pieces (flat runs of a parameter's fp32
weights or moments), and a manifest that says which element lies where. Any world and any ZeRO stage reads from it the slices it
needs; there is no conversion.

It is written aside, forced to the disk, and renamed, so a folder of that name is whole; then ``latest`` is moved. A file that does
not have the size and hash of the manifest is never read: the checkpoint before it is taken instead, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from train import dist
from train.data.files import write_whole
from train.errors import UserError
from train.pieces import Piece, Stateful
from train.progress import Progress

VERSION = 1
MANIFEST = "checkpoint.json"


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
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{file} has {file.stat().st_size} bytes, not {entry['size']}"
            with file.open("rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != entry["sha256"]:
                    return f"{file} does not have the hash it was written with"
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
                found.append(self.files[file].get_slice(_key(kind, name, first))[low - first : high - first])
        whole = torch.cat(found) if len(found) != 1 else found[0]
        if whole.numel() != numel:
            raise ValueError(f"{name} ({kind}) holds {whole.numel()} of the elements {start} to {end}")
        return whole


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, oldest first."""
    found = []
    for path in folder.glob("step_*"):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except (OSError, ValueError):
            continue
        if manifest.get("version") == VERSION:
            found.append(Checkpoint(path, manifest))
    return sorted(found, key=lambda c: c.progress.step)


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int, world: dist.World) -> None:
        self.folder, self.keep_last, self.keep_best, self.world = folder, keep_last, keep_best, world

    def newest(self, note: Callable[[str], None]) -> Checkpoint | None:
        """The newest one that is whole; every rank gets the same, having hashed its share of the files. A collective."""
        for checkpoint in reversed(complete(self.folder)):
            mine = checkpoint.damage(slice(self.world.rank, None, self.world.size))
            damage = next((d for d in dist.gather_objects(mine) if d), None)
            if damage is None:
                return checkpoint
            note(f"{checkpoint.path.name} is damaged and is not used: {damage}")
        return None

    def restore(self, checkpoint: Checkpoint, engine: Stateful) -> None:
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

    def save(self, engine: Stateful, progress: Progress, val_loss: float | None, about: dict[str, Any]) -> Path:
        """Write ``step_<n>``, complete or not at all, and drop those that need not be kept. A collective.

        ``about`` is what a resume must find unchanged. Raises UserError on every rank when any rank cannot write.
        """
        final = self.folder / f"step_{progress.step}"
        aside = self.folder / f".step_{progress.step}.saving"
        self._as_first(lambda: _fresh_folder(self.folder, aside))
        states = {(p.name, kind, p.start): view for p in self._mine(engine) for kind, view in engine.states(p).items()}
        try:
            entry, error = _write_pieces(aside / f"rank_{self.world.rank}.safetensors", states), None
        except (OSError, SafetensorError) as failure:
            entry, error = None, f"rank {self.world.rank}: {failure}"
        reports = dist.gather_objects({"entry": entry, "error": error})
        errors = [r["error"] for r in reports if r["error"]]
        manifest = {
            "version": VERSION,
            "progress": progress.to_dict(),
            "val_loss": val_loss,
            "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
            "kinds": sorted({kind for r in reports if r["entry"] for kind, *_ in r["entry"]["pieces"]}),
            "scalars": engine.scalars(),
            "world_size": self.world.size,
            "files": {f"rank_{rank}.safetensors": r["entry"] for rank, r in enumerate(reports)},
            **about,
        }
        self._as_first(lambda: self._complete(aside, final, manifest, errors))
        return final

    def _mine(self, engine: Stateful) -> Sequence[Piece]:
        """The pieces this rank writes: its own, or, where every rank has all, its share of them."""
        return engine.pieces[self.world.rank :: self.world.size] if engine.replicated else engine.pieces

    def _complete(self, aside: Path, final: Path, manifest: dict[str, Any], errors: Sequence[str]) -> None:
        """Rank 0: turn the folder written aside into a checkpoint, or remove it."""
        try:
            if errors:
                raise OSError("; ".join(errors))
            write_whole(aside / MANIFEST, json.dumps(manifest).encode())
            _sync_folder(aside)
            if final.exists():  # written by an earlier start, and by then found damaged
                shutil.rmtree(final)
            aside.rename(final)
            write_whole(self.folder / "latest", final.name.encode())
            self._prune()
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _prune(self) -> None:
        kept = complete(self.folder)
        best = sorted((c for c in kept if c.val_loss is not None), key=lambda c: (c.val_loss, -c.progress.step))
        keep = {c.path for c in [*kept[-self.keep_last :], *best[: self.keep_best]]}
        for checkpoint in kept:
            if checkpoint.path not in keep:
                gone = self.folder / f".{checkpoint.path.name}.deleting"
                checkpoint.path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _as_first(self, act: Callable[[], None]) -> None:
        """Rank 0 acts while the others wait; its failure is raised on all of them."""
        if error := dist.act_first(act):
            raise UserError(
                f"no checkpoint could be written to {self.folder}: {error}. Earlier checkpoints are untouched. "
                "Make room or mend the folder, then give the same command: the run goes on from the newest one."
            )


def _write_pieces(file: Path, states: dict[tuple[str, str, int], Tensor]) -> dict[str, Any]:
    tensors = {_key(kind, name, start): view.contiguous().cpu() for (name, kind, start), view in states.items()}
    content = serialise(tensors)
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    pieces = [[kind, name, start, view.numel()] for (name, kind, start), view in states.items()]
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pieces": pieces}


def _fresh_folder(folder: Path, aside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".step_*"):
        shutil.rmtree(stale)
    aside.mkdir()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}@{start}"


def _difference(theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> str:
    name = next(n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n))
    return f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
