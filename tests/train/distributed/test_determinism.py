"""The settings of cluster.deterministic: in the environment of a worker, in torch, and in the bits of a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.distributed import determinism
from train.run_dir.compare import compare


def test_environment_fixes_nccl_and_cublas_or_changes_nothing():
    assert determinism.environment(False) == {}
    assert determinism.environment(True) == {
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
        "NCCL_NVLS_ENABLE": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def test_the_environment_is_known_without_torch():
    code = "import sys, json; from train.distributed import determinism; print(json.dumps('torch' in sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=gloo_ranks.REPOSITORY, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) is False


def train_and_look(world, emit, config, corpus):
    """Trains as one rank: how it ended, and whether torch was held to deterministic kernels."""
    return gloo_ranks.train(world, emit, config, corpus), torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("model", "deterministic"), [("gpt_tiny", True), ("gpt_tiny", False), ("lstm_tiny", True)])
def test_two_runs_on_the_cpu_are_equal_bit_for_bit(make, corpus: Path, model, deterministic):
    folders = []
    for name in ("one", "other"):
        more = "cluster.workers=2", "zero=2", f"cluster.deterministic={deterministic}", f"model={model}"
        keys = [] if model == "gpt_tiny" else ["~model.max_len"]
        config = make(*more, *keys, name=name)
        content = gloo_ranks.configuration.to_dict(config)
        assert gloo_ranks.run(2, train_and_look, content, str(corpus)) == [("done", deterministic)] * 2
        folders.append(Path(config.run.dir))
    compared = compare(*folders, 8)
    assert [c.difference for c in compared] == [None] * len(compared)
    assert sum(c.compared for c in compared if c.subject.startswith("tensors")) > 20
