"""The names of the files of a run are a contract: other versions, other tools and people read them."""

from pathlib import Path

import pytest

from train.util.run_layout import RunDir, checkpoint_name, checkpoint_step, checkpoint_steps, shard_name

NAMES = {
    "config": "config.yaml",
    "tokenizer": "tokenizer.json",
    "corpus": "corpus.json",
    "environment": "environment.json",
    "init": "init.json",
    "kernels": "kernels.json",
    "metrics": "metrics.jsonl",
    "samples": "samples.jsonl",
    "skipped": "skipped.jsonl",
    "summary": "summary.json",
    "starts": "run.json",
    "startup": "startup.json",
    "world": "world.json",
    "restarts": "restarts.jsonl",
    "wandb": "wandb",
    "lock": "lock",
    "logs": "logs",
    "checkpoints": "checkpoints",
}


def test_files_of_a_run_have_these_names():
    run = RunDir(Path("runs/x"))
    for name, file in NAMES.items():
        assert getattr(run, name) == Path("runs/x", file)
    assert run.log(3) == Path("runs/x/logs/rank_3.log")
    assert run.checkpoint(40) / shard_name(1) == Path("runs/x/checkpoints/step_40/rank_1.safetensors")


@pytest.mark.parametrize("name", [".step_4.saving", "step_4.bak", "step_", "step_x", "step_04", "latest"])
def test_name_that_is_no_checkpoint_has_no_step(name):
    assert checkpoint_step(name) is None


def test_steps_of_a_folder_are_in_numerical_order(tmp_path):
    assert checkpoint_steps(tmp_path / "absent") == []
    for name in (checkpoint_name(100), checkpoint_name(20), ".step_30.saving", "step_40.bak"):
        (tmp_path / name).mkdir()
    assert checkpoint_steps(tmp_path) == [20, 100]
