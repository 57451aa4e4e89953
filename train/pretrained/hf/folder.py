"""Folders of safetensors with a config.json: read a tensor at a time, and written so, in shards."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.errors import UserError
from train.pretrained.hf.family import HFFamily, Shape
from train.pretrained.hf.listing import CONFIG, INDEX, WHOLE, read_json, weight_files
from train.util.io import write_whole

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HFFolder:
    """The weights of a model that a folder holds, by the names of transformers."""

    def __init__(self, path: Path) -> None:
        """Reads the heads of its files. Raises UserError for pickled weights, and for what is missing or damaged."""
        self.path = path
        self.config = read_json(path / CONFIG)
        files = weight_files(path)
        try:
            self.files = {name: safe_open(path / name, framework="pt") for name in files}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: a file of weights cannot be read ({error}): fetch it again") from error
        self.where = {tensor: file for file in self.files.values() for tensor in file.keys()}  # noqa: SIM118  not a dict

    @cached_property
    def digest(self) -> str:
        """Tells its content from any other, as far as the configuration and the names, shapes and sizes of the weights do."""
        about = [json.dumps(self.config, sort_keys=True)]
        for name in sorted(self.files):
            with (self.path / name).open("rb") as file:
                head = file.read(int.from_bytes(file.read(8), "little"))
            about.append(f"{name} {(self.path / name).stat().st_size} {head!r}")
        return hashlib.sha256("\n".join(about).encode()).hexdigest()

    def name(self, theirs: str, base: str) -> str | None:
        """What a tensor is called in these files: older ones leave out the prefix ``base``."""
        return next((name for name in (theirs, theirs.removeprefix(base)) if name in self.where), None)

    def shape(self, name: str) -> Shape:
        """Of a tensor, without reading it."""
        return tuple(self.where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored. Raises UserError where it is no floating-point numbers, as quantised weights are."""
        tensor = self.where[name].get_tensor(name)
        if tensor.dtype not in FLOATS:
            raise UserError(f"{self.path}: {name} is {tensor.dtype}, and only floating-point weights are read")
        return tensor

    @cached_property
    def tokenizer(self) -> bytes | None:
        """Its tokenizer.json, if it has one."""
        file = self.path / "tokenizer.json"
        return file.read_bytes() if file.exists() else None


class HFWeights:
    """The weights of a folder by our names and in our layout."""

    def __init__(self, folder: HFFolder, family: HFFamily) -> None:
        self.folder, self.family = folder, family
        self.taken: set[str] = set()

    def _parts(self, ours: str) -> tuple[bool, list[str]]:
        """Whether a parameter is stored turned, and the tensors that it is stored in; none where one of them is missing."""
        try:
            stored, names = self.family.names(ours)
        except KeyError:
            return False, []
        found = [self.folder.name(name, self.family.base) for name in names]
        return stored.turned, [name for name in found if name] if all(found) else []

    def shape(self, ours: str) -> Shape | None:
        """The shape that one of our parameters has there, or None where it is missing."""
        turned, names = self._parts(ours)
        shapes = [self.folder.shape(name) for name in names]
        if not shapes:
            return None
        shapes = [shape[::-1] if turned and len(shape) == 2 else shape for shape in shapes]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, ours: str) -> Tensor:
        """One of our parameters."""
        turned, names = self._parts(ours)
        self.taken |= set(names)
        parts = [self.folder.read(name) for name in names]
        parts = [part.T if turned and part.ndim == 2 else part for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def left(self) -> list[str]:
        """The tensors that were not read and that hold a parameter."""
        names = sorted(self.folder.where.keys() - self.taken)
        return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in self.family.ignored)]


Tensors = Sequence[tuple[str, Shape]]


def write_weights(
    folder: Path, tensors: Tensors, read: Callable[[str], Tensor], limit: int, about: dict[str, str]
) -> list[Path]:
    """Write float32 ``tensors`` (name, shape), each got from ``read`` when its turn comes, in files of at most ``limit`` bytes.

    A tensor larger than that has a file of its own. ``about`` goes into the head of every file.
    """
    shards: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for name, shape in tensors:
        numel = 4 * math.prod(shape)
        if shards[-1] and size + numel > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += numel
    total = len(shards)
    names = [WHOLE] if total == 1 else [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, read, about)
    if total > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
        index = {
            "metadata": {"total_size": sum(4 * math.prod(shape) for _, shape in tensors)},
            "weight_map": weight_map,
        }
        write_whole(folder / INDEX, json.dumps(index, indent=1).encode())
    return [folder / name for name in names]


def _write_shard(file: Path, tensors: Tensors, read: Callable[[str], Tensor], about: dict[str, str]) -> None:
    """One file of the format (https://github.com/huggingface/safetensors#format), with no more than one tensor in memory."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"} | about}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 4 * math.prod(shape)
        head[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            tensor = read(name)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {shape}")
            out.write(tensor.contiguous().numpy().data)
        out.flush()
        os.fsync(out.fileno())
