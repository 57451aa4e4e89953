"""Versions of Python, libraries and code on a host, and whether two hosts run the same."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "train", "cluster")
LIBRARIES = ("ray", "torch", "deepspeed")


@functools.cache
def local_versions() -> dict[str, str]:
    """The version of each on this host, by name. Of our code it is a hash of all files, which sees edits too."""
    files: list[Path] = []
    for package in PACKAGES:
        files += (REPOSITORY / package).rglob("*.py")
    code = hashlib.sha256()
    for file in sorted(files):
        code.update(file.relative_to(REPOSITORY).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    return {"Python": platform.python_version(), **libraries, "Trireme's code": code.hexdigest()[:12]}


def check_versions(there: Mapping[str, str], where: str) -> None:
    """Raises UserError naming each version that differs here from what the cluster at ``where`` runs."""
    here = local_versions()
    different = [
        f"  {name}: {there[name]} there, {here[name]} here"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if different:
        cure = "Check out the same commit on both and run ./launch.sh again (it installs what requirements.lock names)"
        if any("code" in line for line in different):
            cure += ", or, where you edited the code after `cluster up`, take the cluster down and up again"
        raise UserError(
            "\n".join([f"this host does not run what the cluster at {where} runs:", *different, cure + "."])
        )
