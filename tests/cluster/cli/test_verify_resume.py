"""The verb verify-resume on real jobs: 10 + 10 steps around a real signal equal 20 steps at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gloo_ranks
from helpers.run_dirs import write_manifest, write_run

from cluster.chaos.train_process import TrainProcess
from cluster.cli import verify_resume
from train.config import load as configuration
from train.util.run_layout import RunDir


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", "verify-resume", *overrides]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ, cwd=gloo_ranks.REPOSITORY, check=False
    )


def test_verify_resume_finds_stopped_runs_equal_to_the_unbroken_one(as_typed, tmp_path: Path):
    more = "cluster.deterministic=true", "cluster.max_failures=0"
    done = run(*as_typed("cluster.workers=2", "zero=2", "steps=400", *more))
    assert done.returncode == 0, done.stdout + done.stderr
    [verdict] = [line for line in done.stdout.splitlines() if "bit for bit" in line]
    assert re.match(r"proven for 2 workers on \S+ CPU, \d+ cores, cluster.deterministic=true: ", verdict)
    assert "SIGTERM" in done.stdout
    assert "SIGKILL" in done.stdout
    assert done.stdout.count("tensors of exp_avg ") == 2
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_verify_resume_refuses_bad_input_before_any_start(as_typed, capsys: pytest.CaptureFixture[str]):
    assert configuration.load(as_typed("steps=8"))
    assert verify_resume.run(as_typed("lerning_rate=1")) == 2
    assert "lerning_rate" in capsys.readouterr().err


def test_step_that_was_saved_before_its_evaluation_counts_as_made(tmp_path: Path):
    run = TrainProcess(write_run(tmp_path / "run", lines=1), [])
    steps = RunDir(run.folder)
    logged = run.step
    write_manifest(steps.checkpoint(logged + 1))
    assert (run.step, run.reached_step) == (logged, logged + 1)
