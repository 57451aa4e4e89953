"""Imports the model of a checkout of nanoGPT, of which no code is here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_peer(checkout: Path) -> ModuleType:
    """model.py of a checkout of nanoGPT, as a module."""
    path = checkout / "model.py"
    if not path.is_file():
        raise SystemExit(f"no model.py in {checkout}: --peer is a checkout of https://github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module
