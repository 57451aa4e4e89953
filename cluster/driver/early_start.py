"""Starts the imports of torch and DeepSpeed, which take longest, before the driver imports the rest."""

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
    """The job's private folder and its fork server, which are there before the command line is even read."""

    folder: Path
    fork_server: fork_server_client.ForkServerProcess
    target: str
    """The function that each rank runs, ``module:function``."""
    since: float
    """When the command was given, in seconds since 1970."""
    signals: StopSignals

    def remove_folder(self) -> None:
        """Removes the job's private folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def start_early(
    signals: StopSignals,
    target: str = TARGET,
    process: type[fork_server_client.ForkServerProcess] = fork_server_client.ForkServerProcess,
) -> EarlyStart:
    """Makes the job's private folder and starts this host's fork server, whose workers will run ``target``.

    The handlers of ``signals`` are installed already; ``TRIREME_T0`` is the moment at which launch.sh was called.
    UserError where this host has no directory for the folder.
    """
    since = float(os.environ.get("TRIREME_T0") or time.time())
    folder = job_dir.make_folder()
    os.environ[job_dir.JOB_ENV] = str(folder)
    tempfile.tempdir = job_dir.temporary_files(folder)  # of this process alone: hosts agree on where job folders are
    early = EarlyStart(folder, process(folder, target), target, since, signals)
    signals.on_exit.append(early.remove_folder)
    return early
