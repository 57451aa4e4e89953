"""Where results are kept: a JSON line each, with what they were measured on."""

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
    """Device, driver, versions, commit and date."""
    found = {"device": processor(), "driver": None, "torch": torch.__version__, "triton": None}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {"device": torch.cuda.get_device_name(device), "driver": said(query).splitlines()[0]}
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    changed = "+" if said(["git", "status", "--porcelain", "--untracked-files=no"], "") else ""
    commit = said(["git", "rev-parse", "--short", "HEAD"]) + changed
    return found | {"commit": commit, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}


def said(command: list[str], otherwise: str = "unknown") -> str:
    """What a command prints, run in the repository."""
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return otherwise


def processor() -> str:
    """The name of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def append(file: Path, rows: list[dict[str, Any]]) -> None:
    """Adds the rows to the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
