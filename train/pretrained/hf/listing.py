"""Reads config.json of a Hugging Face folder and the headers of its weight files, without loading weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from train.errors import UserError
from train.util.io import is_lfs_pointer
from train.util.reading import as_object, read_object, reading

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
FETCH_AGAIN = "Fetch it again from where the folder comes from"
ADAPTER_FILE = "adapter_config.json"
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before the name of every parameter."""
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder.

    Raises UserError where one of them is missing, where there are two sets of weights, or where the weights are
    pickled: pickles are never read.
    """
    if (folder / ADAPTER_FILE).exists():
        raise UserError(
            f"{folder} has an {ADAPTER_FILE}: what it holds is added to the weights of another model. Merge them first "
            "(merge_and_unload of peft, then save_pretrained), and give that folder"
        )
    if (folder / INDEX_FILE).exists():
        names = sorted(set(_weight_map(folder).values()))
        if (folder / WEIGHTS_FILE).exists() and WEIGHTS_FILE not in names:
            raise UserError(
                f"{folder} holds two sets of weights, {WEIGHTS_FILE} and the files of {INDEX_FILE} ({names[0]}, ...): "
                "remove the one that is not meant"
            )
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{folder / INDEX_FILE} names a file that is not in its folder: {outside[0]!r}")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise UserError(f"{folder / INDEX_FILE} names {missing[0]}, which is missing: fetch it again")
        return names
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if pickled := pickled_files(folder):
        raise UserError(
            f"{folder} holds its weights as {pickled[0]}, which is pickled: reading it may run any code that is in "
            "it, so it is not read. Take the safetensors of the same model, or have whoever made it save them so"
        )
    raise UserError(
        f"{folder} has a {CONFIG_FILE} and no weights: {WEIGHTS_FILE}, or {INDEX_FILE} and its files, are missing"
    )


def pickled_files(folder: Path) -> list[str]:
    """Names of the files of a folder that may hold weights, and are never read; beside safetensors they are a copy."""
    names: set[str] = set()
    for pattern in PICKLE_PATTERNS:
        names |= {file.name for file in folder.glob(pattern)}
    return sorted(names)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its name there, its type and shape, and its bytes [begin, end) of the file."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, without the prefixes of wrappers.

    Raises UserError where a file is damaged, a tensor lies in two files, or the index and its files disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in _read_header(folder, file):
            if other := tensors.get(tensor.name):
                raise UserError(f"{folder}: {tensor.name} is in {other.file} and in {file}: one of them is not meant")
            tensors[tensor.name] = tensor
    indexed = _weight_map(folder) if (folder / INDEX_FILE).exists() else {}
    for name, file in indexed.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{folder / INDEX_FILE} says that {name} is in {file}, and it is not: fetch both again")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def same_values(folder: Path, a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal, byte for byte, in type and shape too."""
    if (a.dtype, a.shape, a.end - a.begin) != (b.dtype, b.shape, b.end - b.begin):
        return False
    with (folder / a.file).open("rb") as first, (folder / b.file).open("rb") as second:
        first.seek(a.begin)
        second.seek(b.begin)
        left = a.end - a.begin
        while left > 0:
            size = min(left, _CHUNK)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


_CHUNK = 1 << 22
_LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's name of the file of each tensor."""
    with reading(folder / INDEX_FILE, FETCH_AGAIN):
        weight_map = as_object(read_object(folder / INDEX_FILE, FETCH_AGAIN).get("weight_map"))
        if not all(isinstance(name, str) and name.isprintable() for name in weight_map.values()):
            raise TypeError("its weight_map names files by what is no text")
        if not weight_map:
            raise ValueError("its weight_map names no tensor")
    return weight_map


def _read_header(folder: Path, file: str) -> list[StoredTensor]:
    """The tensors in a safetensors file (https://github.com/huggingface/safetensors#format)."""
    path, tensors = folder / file, list[StoredTensor]()
    with reading(path, FETCH_AGAIN):
        if is_lfs_pointer(path):
            raise UserError(f"{path} is not the weights but Git LFS's note of them: fetch them with `git lfs pull`")
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, path.stat().st_size - 8):
                raise ValueError("its header does not fit into it")
            header = as_object(json.loads(opened.read(length)))
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = (8 + length + int(offset) for offset in about["data_offsets"])
            tensors.append(StoredTensor(file, name, str(about["dtype"]), tuple(map(int, about["shape"])), begin, end))
    return tensors
