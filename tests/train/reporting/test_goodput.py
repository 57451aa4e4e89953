"""Every second of a run has one cause, over all its starts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from helpers import gloo_ranks

from train.reporting.goodput import CAUSES, TimeByCause, goodput


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_time_by_cause_charges_every_moment_to_one_cause():
    clock = Clock()
    times = TimeByCause(clock)
    for cause, seconds in (
        ("start", 3.0),
        ("data", 0.5),
        ("train", 4.0),
        ("data", 0.25),
        ("train", 4.0),
        ("save", 1.0),
    ):
        clock.now += seconds
        assert times.lap(cause) == seconds
    clock.now += 2.0
    assert times.lap("train", save=0.5) == 1.5
    assert times.spent == dict.fromkeys(CAUSES, 0.0) | {"start": 3.0, "data": 0.75, "train": 9.5, "save": 1.5}
    assert sum(times.spent.values()) == clock.now - 1000.0


def test_train_seconds_beyond_the_kept_ones_are_redo():
    clock = Clock()
    times = TimeByCause(clock)
    clock.now += 10.0
    times.lap("train")
    clock.now += 2.0
    times.lap("redo")
    assert times.by_cause(kept=7.0) == dict.fromkeys(CAUSES, 0.0) | {"train": 7.0, "redo": 5.0}
    assert goodput(times.by_cause(kept=7.0)) == pytest.approx(7 / 12)
    assert times.by_cause(kept=11.0)["train"] == 10.0  # never more than was measured


@pytest.mark.parametrize(
    ("seen", "command", "down", "start"),
    [
        (None, 990.0, 0.0, 10.0),  # the first start, from its command on
        (None, None, 0.0, 0.0),
        (900.0, 990.0, 90.0, 10.0),  # the same command again, later
        (995.0, 990.0, 5.0, 0.0),  # a restart within the job: the command is older than what the run did last
        (900.0, None, 100.0, 0.0),
        (1005.0, None, 0.0, 0.0),  # a clock that was set back
    ],
)
def test_time_between_two_starts_is_down_time(seen: float | None, command: float | None, down: float, start: float):
    clock = Clock(1000.0)
    times = TimeByCause(clock)
    clock.now += 2.0
    times.lap("start")
    times.add_earlier_starts({"train": 50.0, "start": 7.0}, seen, command)
    assert (times.spent["down"], times.spent["start"], times.spent["train"]) == (down, 9.0 + start, 50.0)


def test_seconds_of_a_killed_and_resumed_run_sum_to_its_wall_time(make, corpus: Path):
    config = make("steps=40", "save_every=4", "eval_every=0", "cluster.workers=2")
    from train.config import load as configuration

    began = time.time()
    world = gloo_ranks.start(2, gloo_ranks.train, configuration.to_dict(config), str(corpus))
    folder = Path(config.run.dir or "")
    while not (folder / "checkpoints" / "step_8").exists():
        time.sleep(0.01)
    world.kill()
    for process in world.processes:
        process.join()
    time.sleep(1.0)
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    wall = time.time() - began
    summary = json.loads((folder / "summary.json").read_text())
    spent = summary["time_by_cause"]
    assert spent.keys() == set(CAUSES)
    assert sum(spent.values()) == pytest.approx(summary["wall_s"], abs=0.02)
    assert wall - 6 < summary["wall_s"] <= wall  # all but what a process took before it began its run
    assert spent["down"] >= 1.0
    assert summary["goodput"] == pytest.approx(spent["train"] / summary["wall_s"], abs=1e-3)
    assert min(spent.values()) >= 0
