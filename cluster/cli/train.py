"""The verb ``train``: one job, or with ``-m`` a sweep of jobs."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.driver.early_start import EarlyStart
from cluster.driver.train_driver import TrainDriver
from train.config import load as configuration
from train.errors import ExitCode

MULTIRUN = ("-m", "--multirun")


def run(overrides: Sequence[str], early: EarlyStart | None) -> int:
    """Runs the job or sweep that ``overrides`` ask for, or prints the help if ``early`` is None; the exit code."""
    if early is None:
        print(configuration.help_text())
        return ExitCode.OK
    if not {*MULTIRUN} & set(overrides):
        return TrainDriver(overrides, early).main()
    from cluster.sweep.sweep_driver import SweepDriver  # only now: a job needs none of it

    return SweepDriver([word for word in overrides if word not in MULTIRUN], early).main()
