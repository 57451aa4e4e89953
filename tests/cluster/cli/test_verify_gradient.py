"""The verb verify-gradient on a real job: the proof of its first gradient, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gloo_ranks

from cluster.cli import verify_gradient


def test_verify_gradient_proves_a_job_of_two_workers_and_leaves_nothing(as_typed, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "cluster",
        "verify-gradient",
        *as_typed("cluster.workers=2", "zero=2", "steps=400"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ, cwd=gloo_ranks.REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proven: the engine's gradient is that of plain autograd in one process" in done.stdout
    assert "ZeRO stage 2, 2 workers" in done.stdout
    assert not list(tmp_path.iterdir())


def test_verify_gradient_refuses_bad_input_before_any_start(as_typed, capsys: pytest.CaptureFixture[str]):
    assert verify_gradient.run(as_typed("lerning_rate=1")) == 2
    assert "lerning_rate" in capsys.readouterr().err
