"""Going on with a run: the same run goes on, another one under its name is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers import gloo_ranks
from helpers.run_dirs import write_manifest

from train.config import load as configuration
from train.errors import UserError
from train.run_dir import resume


@pytest.fixture
def started(make):
    """start(*overrides): a folder that holds the configuration of an earlier start."""

    def start(*overrides: str):
        config = make(*overrides)
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration.to_dict(config)))
        return config

    return start


def test_new_folder_or_same_configuration_is_accepted(make, started):
    assert resume.check_resumable(make(), "abc") == []
    assert resume.check_resumable(started(), "abc") == []


def test_changes_of_how_a_run_executes_are_accepted_and_listed(make, started):
    started()
    changes = resume.check_resumable(make("steps=20", "cluster.workers=1", "zero=3", "optimizer.lr=1e-4"), "abc")
    assert {change.split(":")[0] for change in changes} == {"steps", "cluster.workers", "zero.stage", "optimizer.lr"}


@pytest.mark.parametrize(
    "override", ["model.layers=3", "seed=1", "batch.global=8", "data.dedup=false", "optimizer=sgd", "batch.seq_len=8"]
)
def test_other_run_under_the_same_name_is_refused_naming_the_key(make, started, override: str):
    started()
    with pytest.raises(UserError) as caught:
        resume.check_resumable(make(override), "abc")
    assert override.split("=")[0].split(".")[-1].replace("optimizer", "optimizer.name") in str(caught.value)
    assert "run.name" in str(caught.value)


def test_other_corpus_than_the_checkpoint_s_is_refused(make, started):
    config = started()
    write_manifest(Path(config.run.dir) / "checkpoints" / "step_1", corpus="old")
    with pytest.raises(UserError, match="corpus"):
        resume.check_resumable(config, "new")


def test_run_with_all_its_steps_is_finished(make, corpus: Path):
    config = make("steps=2")
    assert resume.finished_summary(config) is None
    gloo_ranks.train_world(config, corpus)
    summary = resume.finished_summary(config)
    assert summary is not None
    assert {
        "step",
        "val_loss",
        "perplexity",
        "bits_per_byte",
        "params",
        "tokens",
        "wall_s",
        "goodput",
    } <= summary.keys()
    assert resume.finished_summary(make("steps=3")) is None
