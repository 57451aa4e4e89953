"""Benchmark of a training step beside nanoGPT, run whole at its smallest size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.nanogpt.checkout import load_peer

ROOT = Path(__file__).resolve().parents[3]

# A stand-in for nanoGPT's model.py: its configuration, a forward pass with a loss, and its optimizer.
PEER = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, tokens, targets):
        logits = self.table(tokens)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


def test_bench_step_times_both_sides_with_a_row_for_each_stage(tmp_path: Path):
    (tmp_path / "model.py").write_text(PEER)
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
