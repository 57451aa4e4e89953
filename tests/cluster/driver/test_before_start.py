"""What the driver refuses, or finds done, before Ray or a worker is started; and the folder that it takes back."""

from pathlib import Path

import pytest
import yaml

from cluster.cli.train import find_corpus
from cluster.host import run_lock
from train.checkpoint import manifest
from train.config import load as configuration
from train.errors import UserError


@pytest.fixture
def started(as_typed):
    """started(*overrides): the configuration of a run that was started before."""

    def start(*overrides):
        config = configuration.load(as_typed(*overrides))
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration.to_dict(config)))
        return config

    return start


def silent(event):
    """Nobody looks."""


def test_another_model_is_refused_before_the_corpus_is_looked_at(as_typed, started):
    started()
    config = configuration.load(as_typed("model.layers=3", "data.paths=[/nowhere]"))
    with pytest.raises(UserError, match=r"model.layers: 2 there, 3 here"):
        find_corpus(config, silent)


def test_another_corpus_is_refused(corpus, started):
    config = started()
    assert find_corpus(config, silent) == str(corpus)
    kept = Path(config.run.dir) / "checkpoints" / "step_1"
    kept.mkdir(parents=True)
    (kept / manifest.MANIFEST).write_bytes(manifest.to_bytes({"corpus": "old", "progress": {"step": 1}, "files": {}}))
    with pytest.raises(UserError, match="was trained on the corpus old"):
        find_corpus(config, silent)


def test_a_folder_that_only_the_refused_start_made_is_taken_back(tmp_path):
    with run_lock.lock_run_dir(tmp_path / "new"):
        run_lock.remove_empty_run_dir(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_anything_else_stays_whole(tmp_path):
    with run_lock.lock_run_dir(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("steps: 1")
        run_lock.remove_empty_run_dir(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.yaml", "lock", "logs"]
