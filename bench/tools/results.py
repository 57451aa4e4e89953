"""Writes benchmark results as JSON lines, with the machine they were measured on."""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FOLDER = REPOSITORY / "bench" / "results"
CPU = "cpu"
"""``device`` of rows that no GPU made."""


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit (with + if the tree has changes) and date; what is not there is None.

    ``device`` is the GPU's name, or "cpu".
    """
    row: dict[str, Any] = {"device": CPU, "gpu_bytes": None, "driver": None, "cuda": None, "cudnn": None, "nccl": None}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        properties = torch.cuda.get_device_properties(device)
        row |= {"device": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        row |= {"driver": next(iter((command_output(query) or "").splitlines()), None)}
        row |= {"cudnn": torch.backends.cudnn.version()}
        if torch.distributed.is_nccl_available():
            row["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    row |= {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__}
    row |= {name: installed(name) for name in ("triton", "deepspeed")}
    changed = "+" if command_output(["git", "status", "--porcelain", "--untracked-files=no"]) else ""
    commit = command_output(["git", "rev-parse", "--short", "HEAD"])
    row["commit"] = commit and commit + changed
    return row | {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def command_output(command: list[str]) -> str | None:
    """Standard output of a command run in the repository; None if it fails or is not there."""
    try:
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The model name of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def middle(values: Sequence[float], digits: int) -> tuple[str, str]:
    """The median and the range, as text."""
    return f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def append(file: Path, rows: list[dict[str, Any]]) -> None:
    """Appends the rows to the file, a JSON line each; creates its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def read(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines, parsed; none if it is not there."""
    text = file.read_text("utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
