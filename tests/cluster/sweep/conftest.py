"""A private Ray cluster of two cores with real workers, which the sweeps of a module share."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from helpers import gloo_ranks
from helpers.ray_cluster import private

from cluster.driver import early_start
from cluster.host.stop_request import StopSignals
from cluster.raycluster import status
from cluster.sweep.board import Board
from cluster.sweep.scheduler import SweepScheduler
from cluster.sweep.slot_pool import SweepResources
from cluster.sweep.sweep_driver import open_sweep, results_csv
from train.config import load as configuration
from train.config.sweep_dir import RESULTS
from train.reporting.terminal import UserConsole


@pytest.fixture(scope="module", name="private")
def made():
    with private(2, early_start.TARGET, gloo_ranks.REPOSITORY) as cluster:
        yield cluster


@pytest.fixture
def resources(private) -> SweepResources:
    nodes = status.living_nodes()
    return SweepResources("cpu", nodes, early_start.TARGET, private.spec.folder.name, StopSignals(), private)


@pytest.fixture
def given(corpus: Path) -> list[str]:
    """Overrides of tiny runs on the tests' corpus."""
    return [
        *gloo_ranks.TINY,
        *gloo_ranks.TEXT,
        f"data.paths=[{corpus.parent / 'text'}]",
        f"data.dir={corpus}",
        "cluster.max_failures=0",
    ]


class FinishedSweep:
    """A sweep that was run here, on the shared cluster: its trials, its folder and what it printed."""

    def __init__(self, resources: SweepResources, overrides: list[str]) -> None:
        self.said = io.StringIO()
        self.sweep = configuration.load_sweep(overrides)
        self.folder = Path(self.sweep.settings.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scheduler: SweepScheduler = open_sweep(
            self.sweep, self.folder, Board(*[UserConsole(file=self.said, width=300)] * 2)
        )
        self.trials = self.scheduler.trials
        if self.scheduler.has_more():
            self.scheduler.run(resources)
        (self.folder / RESULTS).write_text(results_csv(self.scheduler))

    @property
    def states(self) -> list[str]:
        return [trial.state for trial in self.trials]


@pytest.fixture
def swept_on(given: list[str]):
    """swept_on(resources, *overrides) -> the FinishedSweep of tiny runs that they ask for."""
    return lambda resources, *overrides: FinishedSweep(resources, [*given, *overrides])


@pytest.fixture
def swept(resources: SweepResources, swept_on):
    """swept(*overrides) -> the FinishedSweep of tiny runs that they ask for, on the shared cluster."""
    return lambda *overrides: swept_on(resources, *overrides)
