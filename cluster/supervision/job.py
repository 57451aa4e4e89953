"""A job as the parts of its driver share it: configuration, connections and the clock of its start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.host.stop_request import StopRequest, StopSignals
from cluster.raycluster.local_cluster import LocalRayCluster
from train.config.schema import Config
from train.util.run_layout import RunDir

Show = Callable[[dict[str, Any]], None]


@dataclass
class StartupClock:
    """Times of the phases of a job's start, in seconds since its command was given."""

    start: float
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str, at: float | None = None) -> None:
        """Records the time at which ``name`` was reached, the first time it is. ``at``: seconds since 1970."""
        self.marks.setdefault(name, (time.time() if at is None else at) - self.start)

    def first_step(self, event: dict[str, Any], run_dir: Path) -> bool:
        """Whether ``event`` is the first step's; if so, writes all times to the run's ``startup.json``, once."""
        first = event["event"] == "phase" and event["name"] == "train" and "first_step_done" not in self.marks
        if first:
            self.mark("first_step_done", event["t"])
            RunDir(run_dir).startup.write_text(json.dumps(self.marks, indent=1) + "\n", encoding="utf-8")
        return first


@dataclass(frozen=True)
class Job:
    """A job: its configuration, what each rank runs, where its events go, and what may stop it."""

    config: Config
    corpus: str
    target: str
    """Function that each rank runs, ``module:function``."""
    folder: str
    """Name of the job's private folder on every host."""
    show: Show
    stop: StopRequest
    clock: StartupClock
    private: LocalRayCluster | None = None
    """The job's own Ray cluster, where it has one."""
    signals: StopSignals | None = None
    """The signal handlers of the driver, where it runs this job alone; a sweep's driver keeps its own."""

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run's folder."""
        return Path(self.config.run.dir or ".").absolute()
