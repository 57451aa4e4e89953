"""A rank of ``train.loop`` without what happens beside its steps: no evaluation, no checkpoint, no log, no console."""

from __future__ import annotations

import torch

from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import Loader
from train.distributed import process_group
from train.engine.engine import Engine
from train.loop import Training
from train.reporting.activity import RankActivity
from train.reporting.meter import DeviceRates, Meter
from train.reporting.profiler import StepProfiler
from train.reporting.tracking import Record
from train.services import RunServices
from train.stability.guard import Guard
from train.state.train_state import TrainState


class NoServices(RunServices):
    """Services left out: the records of logged steps are made and dropped."""

    def __init__(self, workers: int) -> None:
        """None of what the real ones need, but for the meter, which the loop reads."""
        self.meter = Meter(DeviceRates(0.0, workers, None, 1.0), torch.device("cpu"))

    def log(self, record: Record) -> None:
        """Nothing is kept."""

    def evaluate(self, state: TrainState, whole: bool = False) -> Record:
        """Nothing is evaluated."""
        return {}

    def save(self, state: TrainState, val_loss: float | None, pending: Record | None) -> None:
        """Nothing is saved."""

    def wait_for_staging(self) -> None:
        """Nothing is waited for."""

    def poll_save(self) -> bool:
        """No save can fail."""
        return False

    def wait_for_save(self) -> None:
        """Nothing is in flight."""

    @property
    def stall_s(self) -> float:
        """No step waits."""
        return 0.0


def training(
    config: Config,
    world: process_group.DistContext,
    corpus: Corpus,
    engine: Engine,
    loader: Loader,
    services: NoServices,
) -> Training:
    """The loop's rank from its beginning, guarded as any run is; its events are dropped."""
    guard = Guard(
        config, world, corpus, engine, loader, services.wait_for_save, lambda state, why: None, lambda text: None
    )
    activity = RankActivity(lambda event: None)
    return Training(
        config,
        world,
        engine,
        loader,
        services,
        lambda event: None,
        lambda: False,
        guard,
        activity,
        StepProfiler(config, world, activity, lambda event: None),
        TrainState(),
    )
