"""The command ``train`` in a process and a run folder of its own, followed from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.supervision.timeouts import DRIVER_STOP_S
from cluster.worker import ipc
from train.checkpoint import manifest
from train.config import load as configuration
from train.errors import UserError
from train.util.io import FileLock, read_records, steps_of
from train.util.reading import as_object, reading
from train.util.run_layout import RunDir

TIMEOUT_S = 1800.0
PROGRESS_CHECK_S = 0.02
LAST_LINES = 15
OWN_FILE = "The run has written it: repeat the command, and let nothing else write into its folder"

COMPARABLE_SETTINGS = [
    "keep_best=0",
    "log_every=1",
    "eval_every=0",
    "save_mirror=null",
    "tracking.wandb=off",
    "generation.prompts=[]",
]
"""Settings of two runs that are compared: a line of metrics a step, and nothing that leaves their folders."""


@dataclass(frozen=True)
class RankLocation:
    """Where a rank of a running job is, as ``world.json`` has it."""

    rank: int
    pid: int
    """Of its worker."""
    agent_pid: int
    host: str
    ip: str
    node: str

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> RankLocation:
        """The location in one entry of the "ranks" of ``world.json``."""
        keys = ("rank", "pid", "steward", "host", "ip", "node")
        return cls(*(record[key] for key in keys))


@contextmanager
def folder_of_verb(run_dir: str | None, verb: str) -> Iterator[Path]:
    """A folder for the runs of a verb, removed in the end: beside ``run_dir``, where every worker sees it."""
    parent = Path(run_dir or ".").absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{verb}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def with_settings(overrides: Sequence[str], ours: Sequence[str]) -> list[str]:
    """``overrides`` with the settings ``ours`` in place of those of the same keys, and without ``run.dir``."""
    keys = {setting.partition("=")[0] for setting in ours} | {"run.dir"}
    return [o for o in overrides if o.partition("=")[0].lstrip("+") not in keys] + list(ours)


class TrainProcess:
    """The command on one run folder, given as often as need be. Its output goes to ``<folder>.log``."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.overrides = folder, overrides
        self.log = folder.with_name(f"{folder.name}.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.furthest_step = 0
        """The last step that it was ever seen to have made."""
        self.restarts_before = 0
        """Restarts of the job before the command was last given."""

    # ------------------------------------------------------------------------------------------------------ the process

    def start(self, *more: str) -> None:
        """Gives the command, with the settings ``more`` this once. It ends with this process, however that ends."""
        argv = [
            sys.executable,
            "-m",
            "cluster",
            "train",
            *with_settings(self.overrides, more),
            f"run.dir={self.folder}",
        ]
        parent, self.restarts_before = os.getpid(), len(self.restarts)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                argv,
                env={key: value for key, value in os.environ.items() if key != "TRIREME_T0"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the terminal is ours to handle
                preexec_fn=lambda: ipc.die_with_parent(parent),
            )

    def take_kernels_of(self, other: TrainProcess) -> None:
        """Before its first start: give it what the other run has measured, which decides the order of sums."""
        source = RunDir(other.folder).kernels
        if source.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, RunDir(self.folder).kernels)

    def wait_until(self, reached: Callable[[], object], what: str, check_s: float = PROGRESS_CHECK_S) -> None:
        """Waits until ``reached()``, checking every ``check_s`` seconds.

        UserError, with the last lines of its output, where the run ends before or takes too long; ``what`` names there
        what was waited for.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            ended = self.ended
            self.furthest_step = max(self.furthest_step, self.step)
            if reached():
                return
            if ended or time.monotonic() > deadline:
                how = f"ended with exit code {self.exit_code}" if ended else f"went on for {TIMEOUT_S:.0f} s"
                last = "\n".join(self.read_output().splitlines()[-LAST_LINES:])
                raise UserError(f"the run {how} before {what}:\n{last}")
            time.sleep(check_s)

    def stop(self, number: int) -> int | None:
        """Sends signal ``number`` to the driver and waits for its end; the exit code."""
        if self.process is not None and not self.ended:
            self.process.send_signal(number)
            try:
                self.process.wait(DRIVER_STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.exit_code

    def kill(self) -> None:
        """Kills the driver, and with it all processes that it started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def ended(self) -> bool:
        """Whether the command has ended, or was not given yet."""
        return self.process is None or self.process.poll() is not None

    @property
    def exit_code(self) -> int | None:
        """The exit code of the command, once it has ended."""
        return self.process.returncode if self.process else None

    # ---------------------------------------------------------------------------------------------------- what it wrote

    def read_output(self, offset: int = 0) -> str:
        """The output of all starts together, from byte ``offset`` on."""
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")

    @property
    def step(self) -> int:
        """The last step in ``metrics.jsonl``; 0 where there is none."""
        return max(steps_of(read_records(RunDir(self.folder).metrics)), default=0)

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return manifest.newest_step(RunDir(self.folder).checkpoints)

    @property
    def reached_step(self) -> int:
        """The last step that it is known to have made: one that was stopped before its evaluation is saved, and has no
        line of metrics yet.
        """
        return max(self.step, self.saved_step)

    def wait_for_rank0(self) -> None:
        """Waits until no rank 0 of an earlier start writes any more: it outlives a driver that was killed a little."""
        with FileLock(RunDir(self.folder).logs / "writer.lock"):
            pass

    @property
    def restarts(self) -> list[dict]:
        """The records of ``restarts.jsonl``: one for each attempt that trains after another had ended."""
        return read_records(RunDir(self.folder).restarts)

    @property
    def locations(self) -> list[RankLocation]:
        """Where the ranks are, in their order."""
        with reading(RunDir(self.folder).world, OWN_FILE):
            return [RankLocation.from_json(record) for record in self._world["ranks"]]

    @property
    def workers(self) -> int:
        """How many workers the run is to have."""
        return configuration.read(RunDir(self.folder).config).cluster.worker_count

    @property
    def world_size(self) -> int:
        """How many workers train now; 0 while they are being restarted."""
        with reading(RunDir(self.folder).world, OWN_FILE):
            world = self._world
            attempts = [record.get("generation") for record in self.restarts[self.restarts_before :]]
            return len(world["ranks"]) if not world["generation"] or world["generation"] in attempts else 0

    @property
    def _world(self) -> dict[str, Any]:
        return as_object(json.loads(RunDir(self.folder).world.read_text("utf-8")))
