"""The last word of a rank that was told to end: a file in the run's folder, for when its steward is gone before it.

Whoever ends a whole job at once (a batch system, a service manager) signals Ray's processes and the stewards too. The
trainers save none the less, and the driver reads here how they ended.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from train.util.io import write_whole
from train.util.redact import redact


def leave(order: dict[str, Any], code: int, error: str | None) -> None:
    """Notes how the trainer that was started by ``order`` ends: its exit code, and its error if it had one."""
    with contextlib.suppress(OSError):
        write_whole(_place(order), json.dumps({**_who(order), "code": code, "error": error and redact(error)}).encode())


def read(order: dict[str, Any]) -> dict[str, Any] | None:
    """What the trainer that was started by ``order`` left: {"code", "error"}; None while it has not."""
    with contextlib.suppress(OSError, ValueError):
        word = json.loads(_place(order).read_text())
        if {**word, **_who(order)} == word:
            return dict(word)
    return None


def _place(order: dict[str, Any]) -> Path:
    return Path(order["log"]).with_suffix(".end")


def _who(order: dict[str, Any]) -> dict[str, Any]:
    return {"job": order["job"], "generation": order["meeting"]["generation"]}
