"""The command ``train`` as its user gives it: in a process of its own, on a folder of its own, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.supervision.timeouts import DRIVER_STOP_S
from cluster.worker import ipc
from train.checkpoint import manifest
from train.errors import UserError
from train.util.io import read_records
from train.util.run_layout import RunDir

TIMEOUT_S = 1800.0
PROGRESS_CHECK_S = 0.02
LAST_LINES = 15

BESIDE = [
    "keep_best=0",
    "log_every=1",
    "eval_every=0",
    "save_mirror=null",
    "tracking.wandb=off",
    "generation.prompts=[]",
]
"""What two runs that are compared have of every configuration: a line a step, and nothing that leaves their folder."""


@dataclass(frozen=True)
class RankLocation:
    """Where a rank of a running world is, as ``world.json`` has it: ``pid`` is its trainer's, ``steward`` its steward's."""

    rank: int
    pid: int
    steward: int
    host: str
    ip: str
    node: str


def with_settings(overrides: Sequence[str], ours: Sequence[str]) -> list[str]:
    """The overrides, with ``ours`` in the place of those of the same keys."""
    keys = {setting.partition("=")[0] for setting in ours} | {"run.dir"}
    return [o for o in overrides if o.partition("=")[0].lstrip("+") not in keys] + list(ours)


class TrainProcess:
    """The command on one folder, given as often as need be. What it says lies beside the folder."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.overrides = folder, overrides
        self.log = folder.with_name(f"{folder.name}.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.furthest = 0
        """The last step that it was ever seen to have made."""
        self.before = 0
        """Restarts before the last start."""

    # --------------------------------------------------------------------------------------------------------- its life

    def start(self, *more: str) -> None:
        """Give the command, with ``more`` settings this once. It ends with this process, however that ends."""
        words = [
            sys.executable,
            "-m",
            "cluster",
            "train",
            *with_settings(self.overrides, more),
            f"run.dir={self.folder}",
        ]
        parent, self.before = os.getpid(), len(self.restarts)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                words,
                env={key: value for key, value in os.environ.items() if key != "TRIREME_T0"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the terminal is ours to handle
                preexec_fn=lambda: ipc.die_with_parent(parent),
            )

    def until(self, reached: Callable[[], object], what: str, look_s: float = PROGRESS_CHECK_S) -> None:
        """Wait until something is reached. UserError, with the run's last words, where it ends before or takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            over = self.over
            self.furthest = max(self.furthest, self.step)
            if reached():
                return
            if over or time.monotonic() > deadline:
                how = f"ended with exit code {self.code}" if over else f"went on for {TIMEOUT_S:.0f} s"
                last = "\n".join(self.said().splitlines()[-LAST_LINES:])
                raise UserError(f"the run {how}, and not to {what}:\n{last}")
            time.sleep(look_s)

    def end(self, number: int) -> int | None:
        """Send the driver a signal and wait for its end; the exit code."""
        if self.process is not None and not self.over:
            self.process.send_signal(number)
            try:
                self.process.wait(DRIVER_STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.code

    def kill(self) -> None:
        """End it now, with all that it started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def over(self) -> bool:
        """Whether it has ended, or was not begun."""
        return self.process is None or self.process.poll() is not None

    @property
    def code(self) -> int | None:
        """Its exit code once it is over."""
        return self.process.returncode if self.process else None

    # ------------------------------------------------------------------------------------------------------ what it did

    def said(self, offset: int = 0) -> str:
        """What it has said from byte ``offset`` on, all starts together."""
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")

    @property
    def step(self) -> int:
        """The last step that metrics.jsonl has."""
        return max((record["step"] for record in read_records(RunDir(self.folder).metrics)), default=0)

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return manifest.newest_step(RunDir(self.folder).checkpoints)

    @property
    def restarts(self) -> list[dict]:
        """The lines of restarts.jsonl: a world that trains after another had ended."""
        return read_records(RunDir(self.folder).restarts)

    @property
    def places(self) -> list[RankLocation]:
        """Where the ranks are."""
        return [RankLocation(**place) for place in self._world["ranks"]]

    @property
    def size(self) -> int:
        """How many workers train now; 0 while they are being started again."""
        world = self._world
        trains = not world["generation"] or world["generation"] in {
            line["generation"] for line in self.restarts[self.before :]
        }
        return len(world["ranks"]) if trains else 0

    @property
    def _world(self) -> dict[str, Any]:
        return dict(json.loads(RunDir(self.folder).world.read_text()))
