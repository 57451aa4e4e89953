"""Reads config.json of a Hugging Face folder and finds its weight files, without opening weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.errors import UserError

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where it cannot be read or is not an object."""
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder.

    Raises UserError where one of them is missing, or where the weights are pickled: pickles are never read.
    """
    if (folder / INDEX_FILE).exists():
        names = sorted(set(read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
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
