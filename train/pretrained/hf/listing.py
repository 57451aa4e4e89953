"""What a folder of safetensors says of itself in words: its config.json, and which files its weights are in.

Light on purpose: nothing is opened that holds numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.errors import UserError

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(file: Path) -> dict[str, Any]:
    """The object that a file holds. Raises UserError for what is none."""
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights, all of them there. Raises UserError for pickled ones, which are not read."""
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        if strange := [name for name in names if Path(name).name != name]:
            raise UserError(f"{folder / INDEX} names a file that is not in its folder: {strange[0]!r}")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise UserError(f"{folder / INDEX} names {missing[0]}, which is missing: fetch it again")
        return names
    if (folder / WHOLE).exists():
        return [WHOLE]
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} holds its weights as {pickled[0]}, which is pickled: reading it may run any code that is in it, so "
            "it is not read. Take the safetensors of the same model, or have whoever made it save them so"
        )
    raise UserError(f"{folder} has a {CONFIG} and no weights: {WHOLE}, or {INDEX} and its files, are missing")
