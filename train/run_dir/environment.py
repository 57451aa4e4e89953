"""What made a run, beside its configuration and its corpus: versions, commit, machine. No environment, no arguments: no secret."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "deepspeed", "ray", "triton", "numpy", "tokenizers", "webdataset")
ROOT = Path(__file__).resolve().parents[2]


def lineage(device: torch.device, workers: int) -> dict[str, str | int]:
    """For ``environment.json``: plain values, each what the run had at its newest start."""
    found: dict[str, str | int] = {"commit": commit(), "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or ""}
    else:
        found["device"] = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return found | {"workers": workers, "system": platform.platform(terse=True)}


def commit() -> str:
    """The commit of this code, with ``-dirty`` where files differ from it; empty outside a git repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
