"""The race beside nanoGPT: its held-out loss is over every character, and a whole race runs at its smallest."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nanogpt_model import MODEL
from torch.nn import functional as F

from bench.nanogpt import race

ROOT = Path(__file__).resolve().parents[3]

# The rest of a stand-in for a checkout of nanoGPT: a table of the next character's counts, as its train.py would.
PREPARE = """
import numpy as np
text = open("input.txt").read()
ids = np.array([sorted(set(text)).index(c) for c in text], np.uint16)
ids[: len(ids) * 9 // 10].tofile("train.bin")
ids[len(ids) * 9 // 10 :].tofile("val.bin")
"""
TRAIN = """
import os, sys
from model import GPT, GPTConfig
import torch
assert "--max_iters=3" in sys.argv and "--device=cpu" in sys.argv
os.makedirs("out-shakespeare-char")
arguments = {"vocab_size": 10}
state = {"model": GPT(GPTConfig(**arguments)).state_dict(), "model_args": arguments}
torch.save(state, "out-shakespeare-char/ckpt.pt")
"""


class Constant(torch.nn.Module):
    """A model of one distribution for every place, with a loss that is its mean over the targets."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, targets):
        logits = self.logits.expand(*tokens.shape, -1)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("length", [2, 64, 65, 66, 64 * 64 * 2 + 1, 9001])
def test_held_out_loss_counts_every_character_but_the_first_once(length):
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    ids = np.random.default_rng(length).integers(0, 7, length).astype(np.uint16)
    expected = -logits.double().log_softmax(-1)[torch.from_numpy(ids[1:].astype(int))].mean()
    assert math.isclose(race.held_out_loss(Constant(logits), ids), expected, rel_tol=1e-5)


def test_race_runs_both_sides_and_says_who_came_first(tmp_path):
    checkout = tmp_path / "nanoGPT"
    data = checkout / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for file, code in ((checkout / "model.py", MODEL), (checkout / "train.py", TRAIN), (data / "prepare.py", PREPARE)):
        file.write_text(code)
    text = tmp_path / "text.txt"
    text.write_text("ROMEO: abc\n" * 500)
    few = ["--rounds=1", "--steps=3", "steps=3", "schedule.warmup=1", "model.layers=1", "model.width=32"]
    command = [ROOT / "launch.sh", "bench", "race", "--peer", checkout, "--text", text, *few, "model.heads=2"]
    race_run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert race_run.returncode in (0, race.goals.MISSED), race_run.stdout + race_run.stderr
    assert "round 1  nanoGPT" in race_run.stdout
    assert "ours / nanoGPT:" in race_run.stdout
    assert "round 1  ours" in race_run.stdout
