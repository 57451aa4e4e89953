"""The checks of the driver before Ray or a worker is started, and the folder that it removes."""

from pathlib import Path

import pytest
import yaml
from helpers.run_dirs import write_manifest

from cluster.driver.prepared_corpus import find_corpus
from cluster.driver.train_driver import plan_workers
from cluster.host import run_lock
from cluster.raycluster import connect
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


def ignore(event):
    """Takes the events of preparation, which these tests do not look at."""


def test_another_model_is_refused_before_the_corpus_is_read(as_typed, started):
    started()
    config = configuration.load(as_typed("model.layers=3", "data.paths=[/nowhere]"))
    with pytest.raises(UserError, match=r"model.layers: 2 there, 3 here"):
        find_corpus(config, ignore)


def test_another_corpus_than_the_checkpoints_is_refused(corpus, started):
    config = started()
    assert find_corpus(config, ignore) == str(corpus)
    write_manifest(Path(config.run.dir) / "checkpoints" / "step_1", corpus="old")
    with pytest.raises(UserError, match="was trained on the corpus old"):
        find_corpus(config, ignore)


def test_empty_run_folder_of_a_refused_start_is_removed(tmp_path):
    with run_lock.lock_run_dir(tmp_path / "new"):
        run_lock.remove_empty_run_dir(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_run_folder_with_other_files_is_kept_after_a_refused_start(tmp_path):
    with run_lock.lock_run_dir(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("steps: 1")
        run_lock.remove_empty_run_dir(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.yaml", "lock", "logs"]


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["batch.micro=4"], "has room for 2: batch.micro=4 is more than a worker's share of 3 sequences"),
        (["cluster.workers=99", "batch.global=99"], "cluster.workers=99 asks for 99 workers of 1 core"),
    ],
)
def test_workers_that_do_not_fit_this_host_are_refused_before_the_start(monkeypatch, overrides, cure):
    monkeypatch.setattr(connect.resources, "count_cpus", lambda: 2)
    monkeypatch.setattr(connect.resources, "count_gpus", lambda: 0)
    config = configuration.load(["experiment=gpt_tiny", "cluster.start=here", *overrides])
    nodes = connect.nodes_before_start(config.cluster)
    with pytest.raises(UserError, match=cure):
        plan_workers(config, nodes)


def test_nodes_of_a_cluster_elsewhere_are_not_known_before_the_start():
    config = configuration.load(["cluster.address=10.0.0.1:6379"])
    assert connect.nodes_before_start(config.cluster) is None
