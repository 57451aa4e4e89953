"""A rank of real training whose device fails once: in the first trial of a sweep that comes to it."""

from __future__ import annotations

from pathlib import Path

from train import run

ECC = "CUDA error: uncorrectable ECC error encountered"
MARK = "device_failed"
"""File beside the trials' folders that is there once the device has failed."""


def train_rank(config, corpus, context, emit, should_stop):
    """Trains as ``train.run.train_rank``, but for the first call of a sweep, which fails with CUDA's words."""
    mark = Path(config.run.dir).parent / MARK
    if not mark.exists():
        mark.touch()
        raise RuntimeError(ECC)
    return run.train_rank(config, corpus, context, emit, should_stop)
