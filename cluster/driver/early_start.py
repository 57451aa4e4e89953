"""The first moments of a driver: what takes longest is begun before anything else is even imported."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.host import job_dir
from cluster.host.stop_request import StopSignals
from cluster.worker import fork_server_client

TARGET = "train.run:train_rank"


@dataclass(frozen=True)
class EarlyStart:
    """What is under way: the job's private folder, its warm process, and the moment the command was given."""

    folder: Path
    fork_server: fork_server_client.ForkServerProcess
    target: str
    since: float
    signals: StopSignals

    def clear(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def start_early(signals: StopSignals, target: str = TARGET) -> EarlyStart:
    """Makes the job's folder and starts this host's warm process, which will run ``target`` (module:function) in each
    rank. ``signals`` is installed already.
    """
    since = float(os.environ.get("TRIREME_T0") or time.time())
    folder = job_dir.make_folder()
    os.environ[job_dir.JOB_ENV] = str(folder)
    tempfile.tempdir = job_dir.temporary_files(folder)  # of this process alone: hosts agree on where job folders are
    begun = EarlyStart(folder, fork_server_client.ForkServerProcess(folder, target), target, since, signals)
    signals.on_exit.append(begun.clear)
    return begun
