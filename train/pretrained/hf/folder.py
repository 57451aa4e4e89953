"""Hugging Face folders (config.json and safetensors), read by ranges and written one tensor at a time."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train.errors import UserError
from train.pretrained.hf.family import HFFamily, Shape
from train.pretrained.hf.listing import CONFIG_FILE, FETCH_AGAIN, INDEX_FILE, WEIGHTS_FILE, read_headers
from train.util.io import write_whole
from train.util.reading import read_object, reading

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HFFolder:
    """A Hugging Face folder opened for reading: configuration, tokenizer, and tensors by transformers' names."""

    def __init__(self, path: Path) -> None:
        """Read the headers of the weight files. Raises UserError for pickled, missing or damaged weights."""
        self.path = path
        self.config = read_object(path / CONFIG_FILE, FETCH_AGAIN)
        self.tensors = read_headers(path)
        self.files: dict[str, Any] = {}
        for name in sorted({tensor.file for tensor in self.tensors.values()}):
            with reading(path / name, FETCH_AGAIN):
                self.files[name] = safe_open(path / name, framework="pt")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the configuration and of each weight file's name, size and header (tensor names and shapes)."""
        lines = [json.dumps(self.config, sort_keys=True)]
        for name in sorted(self.files):
            with reading(self.path / name, FETCH_AGAIN), (self.path / name).open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
            lines.append(f"{name} {(self.path / name).stat().st_size} {header!r}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, read from the file's header."""
        return self.tensors[name].shape

    def read(self, name: str, rows: slice, transposed: bool) -> Tensor:
        """Rows of a tensor, or of its transpose, in its stored precision.

        Raises UserError where it is not floating-point (quantised weights).
        """
        stored = self.tensors[name]
        with reading(self.path / stored.file, FETCH_AGAIN):
            part = self.files[stored.file].get_slice(stored.name)
            tensor = part[:, rows].T if transposed else part[rows]
        if tensor.dtype not in FLOAT_DTYPES:
            raise UserError(f"{self.path}: {name} is {tensor.dtype}, and only floating-point weights are read")
        return tensor

    @cached_property
    def tokenizer(self) -> bytes | None:
        """Content of tokenizer.json, or None where the folder has none."""
        file = self.path / "tokenizer.json"
        with reading(file, FETCH_AGAIN):
            return file.read_bytes() if file.exists() else None


class HFWeights:
    """Weights of a Hugging Face folder by our parameter names and in our layout (a ``WeightReader``)."""

    def __init__(self, folder: HFFolder, family: HFFamily, tied: bool) -> None:
        """``tied``: the embedding is the head's matrix too, so that either may stand for both."""
        self.folder, self.family, self.tied = folder, family, tied

    def _stored_parts(self, name: str) -> tuple[bool, list[str]]:
        """Whether our parameter is stored transposed, and the tensors it is stored in: none if one is missing."""
        try:
            mapping, hf_names = self.family.hf_names(name)
        except KeyError:
            return False, []
        stored = [self.family.stored_name(hf_name, self.folder.tensors, self.tied) for hf_name in hf_names]
        return mapping.transposed, [part for part in stored if part] if all(stored) else []

    def shape(self, name: str) -> Shape | None:
        """Shape that our parameter ``name`` has in this folder, or None where it is missing."""
        transposed, parts = self._stored_parts(name)
        shapes = [self.folder.shape(part) for part in parts]
        if not shapes:
            return None
        shapes = [shape[::-1] if transposed and len(shape) == 2 else shape for shape in shapes]
        if not all(shape and shape[1:] == shapes[0][1:] for shape in shapes):
            raise UserError(f"{self.folder.path}: {', '.join(parts)} are of shapes {shapes}, and are parts of {name}")
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of our flattened parameter ``name``, in its stored precision.

        Only the rows that hold them are read, from the tensors whose rows follow each other in the parameter.
        """
        transposed, parts = self._stored_parts(name)
        shape = self.shape(name)
        assert shape is not None
        width = math.prod(shape[1:])
        low, high, first, rows = start // width, -(-(start + numel) // width), 0, []
        for part in parts:
            stored = self.folder.shape(part)
            turned = transposed and len(stored) == 2
            count = stored[1 if turned else 0]
            if first < high and low < first + count:
                rows.append(self.folder.read(part, slice(max(low - first, 0), min(high - first, count)), turned))
            first += count
        return torch.cat(rows).reshape(-1).narrow(0, start - low * width, numel)

    def unread(self, read: Collection[str]) -> list[str]:
        """Tensors that hold a parameter, and none of those ``read``, by their names in the files."""
        used = {part for name in read for part in self._stored_parts(name)[1]}
        return [name for name in sorted(self.folder.tensors.keys() - used) if not self._is_ignored(name)]

    def unread_backbone(self, read: Collection[str], skipped: Iterable[str]) -> list[str]:
        """Those of ``unread`` that the backbone of their model computes with, but for our parameters ``skipped``."""
        left = {part for name in skipped for part in self._stored_parts(name)[1]}
        return [name for name in self.unread(read) if name not in left and self.family.is_backbone_tensor(name)]

    def _is_ignored(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.family.ignored_tensors)


TensorSpecs = Sequence[tuple[str, Shape]]
"""Name and shape of each tensor to write."""


def write_weights(
    folder: Path, tensors: TensorSpecs, read: Callable[[str], Tensor], max_bytes: int, metadata: dict[str, str]
) -> list[Path]:
    """Write float32 tensors to safetensors files of at most ``max_bytes``, calling ``read(name)`` for one at a time.

    A tensor larger than that has a file of its own. ``metadata`` goes into the header of every file. Returns the files.
    """
    shards: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for name, shape in tensors:
        nbytes = 4 * math.prod(shape)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    total = len(shards)
    files = [WEIGHTS_FILE] if total == 1 else [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        _write_shard(folder / file, shard, read, metadata)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    if total > 1:
        total_size = sum(4 * math.prod(shape) for _, shape in tensors)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_whole(folder / INDEX_FILE, json.dumps(index, indent=1).encode())
    return [folder / file for file in files]


def _write_shard(file: Path, tensors: TensorSpecs, read: Callable[[str], Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file (https://github.com/huggingface/safetensors#format), with one tensor in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
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
