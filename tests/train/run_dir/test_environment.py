"""Lineage of a run: versions, commit and machine, without the environment."""

from __future__ import annotations

import re
from importlib import metadata

import torch

from train.run_dir import environment


def test_lineage_has_versions_commit_and_machine_and_no_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    found = environment.lineage(torch.device("cpu"), 3)
    assert found["torch"] == metadata.version("torch")
    assert found["workers"] == 3
    assert re.fullmatch(r"([0-9a-f]{12}(-dirty)?)?", str(found["commit"]))
    assert "canary" not in str(found)


def test_commit_outside_a_repository_is_empty(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() == ""
