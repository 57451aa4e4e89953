"""What a host runs, and whether two hosts run the same: Python, Ray, torch and our own code."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "train", "cluster")
LIBRARIES = ("ray", "torch", "deepspeed")


def here() -> dict[str, str]:
    """The version of each, by name; of our code the hash, which says what a commit would and sees an edit too."""
    files = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))
    code = hashlib.sha256()
    for file in files:
        code.update(file.relative_to(REPOSITORY).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    found = {"Python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}
    return found | {"Trireme's code": code.hexdigest()[:12]}


def compare(there: Mapping[str, str], where: str) -> None:
    """Raises UserError naming each version that differs from what the cluster at ``where`` runs."""
    mine = here()
    different = [
        f"  {name}: {there[name]} there, {mine[name]} here"
        for name in mine
        if name in there and there[name] != mine[name]
    ]
    if different:
        cure = "Check out the same commit on both and run ./launch.sh again (it installs what requirements.lock names)"
        if any("code" in line for line in different):
            cure += ", or, where you edited the code after `cluster up`, take the cluster down and up again"
        raise UserError(
            "\n".join([f"this host does not run what the cluster at {where} runs:", *different, cure + "."])
        )
