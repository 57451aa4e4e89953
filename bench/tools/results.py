"""Writes benchmark results as JSON lines, with the machine they were measured on."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FOLDER = REPOSITORY / "bench" / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions of torch and Triton, commit (with + if the tree has changes) and date."""
    row = {"device": processor(), "driver": None, "torch": torch.__version__, "triton": None}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        row |= {"device": torch.cuda.get_device_name(device), "driver": command_output(query).splitlines()[0]}
    with contextlib.suppress(PackageNotFoundError):
        row["triton"] = version("triton")
    changed = "+" if command_output(["git", "status", "--porcelain", "--untracked-files=no"], "") else ""
    commit = command_output(["git", "rev-parse", "--short", "HEAD"]) + changed
    return row | {"commit": commit, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}


def command_output(command: list[str], default: str = "unknown") -> str:
    """Standard output of a command run in the repository; ``default`` if it fails."""
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return default


def processor() -> str:
    """The model name of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def append(file: Path, rows: list[dict[str, Any]]) -> None:
    """Appends the rows to the file, a JSON line each; creates its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
