"""Benchmark of a training step beside nanoGPT, run whole at its smallest size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.nanogpt_model import MODEL

from bench.nanogpt.checkout import load_peer

ROOT = Path(__file__).resolve().parents[3]


def test_bench_step_times_both_sides_with_a_row_for_each_stage(tmp_path: Path):
    (tmp_path / "model.py").write_text(MODEL)
    few = ["--rounds", "2", "--steps", "2", "--threads", "1", "--stages", "0,2"]
    small = ["model.layers=1", "model.width=32", "log_every=2"]
    command = [sys.executable, "-m", "bench.nanogpt.step", "--peer", str(tmp_path), *few, *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_BUILD_OPS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a table of bigrams is faster than a transformer
    for words in ("1 layers, 32 wide, 12 x 64", "nanoGPT", "ours, ZeRO 0", "ours, ZeRO 2", "goal: at most 1.05"):
        assert words in done.stdout


def test_bench_step_names_a_folder_that_is_not_nanogpt(tmp_path: Path):
    with pytest.raises(SystemExit, match=f"no model.py in {tmp_path}"):
        load_peer(tmp_path)
