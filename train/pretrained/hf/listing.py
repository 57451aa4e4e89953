"""Reads config.json of a Hugging Face folder and finds its weight files, without opening weights."""

from __future__ import annotations

from pathlib import Path

from train.errors import UserError
from train.util.reading import as_object, read_object, reading

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
FETCH_AGAIN = "Fetch it again from where the folder comes from"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder.

    Raises UserError where one of them is missing, or where the weights are pickled: pickles are never read.
    """
    if (folder / INDEX_FILE).exists():
        with reading(folder / INDEX_FILE, FETCH_AGAIN):
            names = sorted(set(as_object(read_object(folder / INDEX_FILE, FETCH_AGAIN).get("weight_map")).values()))
            if not all(isinstance(name, str) and name.isprintable() for name in names):
                raise TypeError("its weight_map names files by what is no text")
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{folder / INDEX_FILE} names a file that is not in its folder: {outside[0]!r}")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise UserError(f"{folder / INDEX_FILE} names {missing[0]}, which is missing: fetch it again")
        return names
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    pickled: list[str] = []
    for pattern in PICKLE_PATTERNS:
        pickled += [file.name for file in folder.glob(pattern)]
    if pickled:
        raise UserError(
            f"{folder} holds its weights as {min(pickled)}, which is pickled: reading it may run any code that is in "
            "it, so it is not read. Take the safetensors of the same model, or have whoever made it save them so"
        )
    raise UserError(
        f"{folder} has a {CONFIG_FILE} and no weights: {WEIGHTS_FILE}, or {INDEX_FILE} and its files, are missing"
    )
