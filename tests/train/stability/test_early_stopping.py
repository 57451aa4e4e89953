"""Early stopping: a run ends where its metric has not become better for so long, and what it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import gloo_ranks

from train.config.schema import StopConfig
from train.errors import UserError
from train.run_dir import resume
from train.run_dir.open_run import open_run
from train.stability.early_stopping import should_stop, update
from train.state.train_state import TrainState

WILD = [
    "optimizer=sgd",
    "optimizer.clip=0",
    "optimizer.lr=6",
    "spikes.watch=off",
    "eval_every=1",
    "save_every=1",
    "steps=30",
]
"""The loss goes up and down."""


def judged(stop: StopConfig, values: list[float | None]) -> list[tuple[int, int]]:
    progress, found = TrainState(), []
    for step, value in enumerate(values, 1):
        progress = update(stop, replace(progress, step=step), {"f1": value, "val_loss": value})
        found.append((progress.best_step, progress.evals_since_best))
    return found


def test_lower_is_better_for_losses_and_higher_for_other_metrics():
    assert judged(StopConfig(), [3.0, 2.0, 2.5, 2.0, 1.0]) == [(1, 0), (2, 0), (2, 1), (2, 2), (5, 0)]
    assert judged(StopConfig(metric="f1"), [0.3, 0.5, None, float("nan"), 0.6]) == [
        (1, 0),
        (2, 0),
        (2, 1),
        (2, 2),
        (5, 0),
    ]
    assert should_stop(StopConfig(patience=2), TrainState(evals_since_best=2))
    assert not should_stop(StopConfig(patience=2), TrainState(evals_since_best=1))
    assert not should_stop(StopConfig(patience=0), TrainState(evals_since_best=9))
    with pytest.raises(UserError, match=r"stop.metric=acc is not measured here. There are: val_loss"):
        update(StopConfig(metric="acc"), TrainState(), {"val_loss": 1.0})


def test_run_without_improvement_ends_early_and_keeps_its_best(make, corpus: Path):
    keys = [*WILD, "keep_last=1", "keep_best=1", "cluster.workers=2"]
    config = make(*keys, "stop.patience=3")
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    losses = [line["val_loss"] for line in gloo_ranks.metrics(config)]
    end, best = len(losses), losses.index(min(losses)) + 1
    assert end == best + 3 < 30
    folder = Path(config.run.dir)
    assert sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*")) == [best, end]
    assert open_run(folder, "best").checkpoint.progress.step == best
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["step"], summary["stale"]) == (end, 3)
    assert resume.finished_summary(config) == summary


def test_best_model_between_saves_is_saved(make, corpus: Path):
    config = make(*WILD, "save_every=0", "keep_last=1", "keep_best=1", "stop.patience=3", "cluster.workers=2")
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    losses = [line["val_loss"] for line in gloo_ranks.metrics(config)]
    best, folder = losses.index(min(losses)) + 1, Path(config.run.dir)
    assert sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*")) == [best, len(losses)]
    assert open_run(folder, "best").checkpoint.progress.score == min(losses)


def test_early_stopping_across_a_resume_counts_on_and_obeys_new_patience(make, corpus: Path):
    whole, parts = (make(*WILD, "stop.patience=3", name=name) for name in ("whole", "parts"))
    gloo_ranks.train_world(whole, corpus)
    end = len(gloo_ranks.metrics(whole))
    gloo_ranks.train_world(parts, corpus, {"event": "step", "step": end - 1})
    gloo_ranks.train_world(parts, corpus)
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)
    patient = make(*WILD, "stop.patience=4", name="parts")
    assert resume.finished_summary(patient) is None
    assert set(gloo_ranks.train_world(patient, corpus)) == {"done"}
    assert len(gloo_ranks.metrics(patient)) > end
    assert gloo_ranks.metrics(patient)[:end] == gloo_ranks.metrics(whole)
