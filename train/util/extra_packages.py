"""Packages of requirements-extra.lock, which only some data need: added to the environment when first asked for."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from train.errors import UserError

LAUNCH = Path(__file__).resolve().parents[2] / "launch.sh"
STAMP = ".ready"
"""The file that launch.sh leaves in an environment of its own."""


def import_extra(module: str, need: str) -> ModuleType:
    """The imported module, after ``require_extra``."""
    require_extra(module, need)
    return importlib.import_module(module)


def require_extra(module: str, need: str) -> None:
    """Adds the packages of requirements-extra.lock to the environment, in words, if ``module`` is not installed.

    ``need`` begins the message: "x.parquet: a table of Parquet". Raises UserError where they cannot be added: no
    package index is reachable, or the environment is read-only or is none that launch.sh made.
    """
    package = module.partition(".")[0]
    if find_spec(package) is not None:
        return
    lacking = f"{need}, which takes the package {package}"
    if not (LAUNCH.exists() and (Path(sys.prefix) / STAMP).exists()):
        raise UserError(f"{lacking}: pip install {package}")
    print(f"{lacking}: adding it", file=sys.stderr, flush=True)
    added = subprocess.run(
        [LAUNCH, "setup", "extra"],
        env={**os.environ, "TRIREME_VENV": sys.prefix},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    importlib.invalidate_caches()
    if added.returncode or find_spec(package) is None:
        raise UserError(
            f"{lacking}, and it could not be added (see above): pip install {package}, then give this again"
        )
