"""A private Ray cluster of two cores with real trainers, which the sweeps of a module share."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from helpers import gloo_ranks
from helpers.ray_cluster import private
from rich.console import Console

from cluster.cli.train import find_corpus
from cluster.driver import early_start
from cluster.host.stop_request import StopSignals
from cluster.sweep.board import Board
from cluster.sweep.cli import open_sweep, results
from cluster.sweep.scheduler import SweepScheduler
from cluster.sweep.slot_pool import SweepResources
from train.config import load as configuration
from train.config.sweep_dir import RESULTS


@pytest.fixture(scope="module", name="private")
def made():
    with private(2, early_start.TARGET, gloo_ranks.REPOSITORY) as cluster:
        yield cluster


@pytest.fixture
def ground(private) -> SweepResources:
    return SweepResources("cpu", early_start.TARGET, private.start.folder.name, StopSignals(), find_corpus, private)


@pytest.fixture
def given(corpus: Path) -> list[str]:
    """What is typed for tiny runs on the tests' corpus."""
    return [
        *gloo_ranks.TINY,
        *gloo_ranks.TEXT,
        f"data.paths=[{corpus.parent / 'text'}]",
        f"data.dir={corpus}",
        "cluster.max_failures=0",
    ]


class Swept:
    """A sweep that was run here, on the shared cluster: its trials, its folder and what it said."""

    def __init__(self, ground: SweepResources, overrides: list[str]) -> None:
        self.said = io.StringIO()
        self.sweep = configuration.load_sweep(overrides)
        self.folder = Path(self.sweep.settings.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.queue: SweepScheduler = open_sweep(
            self.sweep, self.folder, Board(*[Console(file=self.said, width=300)] * 2)
        )
        self.trials = self.queue.trials
        if self.queue.more():
            self.queue.run(ground)
        (self.folder / RESULTS).write_text(results(self.queue))

    @property
    def states(self) -> list[str]:
        return [trial.state for trial in self.trials]


@pytest.fixture
def swept(ground: SweepResources, given: list[str]):
    """swept(*overrides) -> the sweep of tiny runs that they ask for, run to its end."""
    return lambda *overrides: Swept(ground, [*given, *overrides])
