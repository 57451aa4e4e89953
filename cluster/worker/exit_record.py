"""Exit records: how a worker ended, in a file that the driver reads when the worker's agent is lost.

Whoever ends a whole job at once (a batch system, a service manager) signals Ray's processes and the agents too. The
workers save none the less, and the driver reads here how they ended.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from cluster.worker.messages import StartOrder
from train.util.io import write_whole
from train.util.redact import redact


def write(order: StartOrder, code: int, error: str | None) -> None:
    """Records how the worker that ``order`` started ends: its exit code, and its error if it had one."""
    record = {**_identity(order), "code": code, "error": error and redact(error)}
    with contextlib.suppress(OSError):
        write_whole(_path(order), json.dumps(record).encode())


def read(order: StartOrder) -> dict[str, Any] | None:
    """The record {"code", "error"} of the worker that ``order`` started; None while there is none."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(_path(order).read_text("utf-8"))
        if {**record, **_identity(order)} == record:
            return dict(record)
    return None


def _path(order: StartOrder) -> Path:
    return Path(order.log).with_suffix(".end")


def _identity(order: StartOrder) -> dict[str, Any]:
    """Tells this start's record from one that an earlier job or attempt left in the same folder."""
    return {"job": order.job, "generation": order.rendezvous.attempt}
