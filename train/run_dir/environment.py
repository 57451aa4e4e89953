"""Lineage of a run: versions, commit and machine; no environment variables, hence no secrets."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from train.distributed.device import describe

PACKAGES = ("torch", "deepspeed", "ray", "triton", "numpy", "tokenizers", "webdataset")
ROOT = Path(__file__).resolve().parents[2]


def lineage(device: torch.device, workers: int) -> dict[str, str | int]:
    """The content of ``environment.json``, of the newest start of the run: plain values."""
    versions: dict[str, str | int] = {"commit": commit(), "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    versions["device"] = describe(device).name
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda or ""
    return versions | {"workers": workers, "system": platform.platform(terse=True)}


def commit() -> str:
    """The commit of this code, with ``-dirty`` for uncommitted changes; empty outside a git repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.strip()
    return ""
