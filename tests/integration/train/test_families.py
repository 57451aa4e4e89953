"""Every family with its objective, on real gloo ranks under real ZeRO: the same promises as the decoder's
(`test_run.py`).
"""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration
from train.config.schema import Config

TINY = ("llama", "rnn", "gru", "lstm", "bert", "t5", "transformer")
"""``gpt_tiny`` is what all other tests run."""
STAGES = dict(zip(TINY, itertools.cycle((2, 1, 3, 0)), strict=False))
"""Under which stage each is killed by default; `slow` does all."""


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path):
    """tiny(family, *overrides, name=) -> the experiment <family>_tiny, eight steps of it, on the corpus."""

    def composed(family: str, *overrides: str, name: str) -> Config:
        here = [
            "data.paths=[x]",
            f"data.dir={corpus}",
            f"run.dir={tmp_path / name}",
            "steps=8",
            "eval_every=4",
            "save_every=4",
        ]
        return configuration.load([f"experiment={family}_tiny", *gloo_ranks.TEXT, *here, *overrides])

    return composed


def die(world, emit, config, corpus) -> None:
    """Train until the first checkpoint is known to be complete, and be killed at that moment."""

    def watch(event) -> None:
        emit(event)
        if event["event"] == "save":
            os.kill(os.getpid(), signal.SIGKILL)

    gloo_ranks.train(world, watch, config, corpus)


def whole_and_killed(tiny, corpus: Path, family: str, stage: int, workers: int) -> list[dict]:
    """The lines of a whole run, after a run that was killed and went on was found to have the same, bit for bit."""
    name = f"{family}{stage}{workers}"
    whole, parts = (
        tiny(family, f"zero={stage}", f"cluster.workers={workers}", name=name + part) for part in ("whole", "parts")
    )
    gloo_ranks.train_world(whole, corpus)
    killed = gloo_ranks.start(workers, die, configuration.to_dict(parts), str(corpus)).wait()
    assert -signal.SIGKILL in [rank.code for rank in killed]
    assert (Path(parts.run.dir or "") / "checkpoints/step_4").is_dir()
    assert not (Path(parts.run.dir or "") / "summary.json").exists()
    gloo_ranks.train_world(parts, corpus)
    lines = gloo_ranks.metrics(whole)
    assert gloo_ranks.metrics(parts) == lines
    expected, found = gloo_ranks.state(whole, 8), gloo_ranks.state(parts, 8)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    return lines


def agree(lines: list[dict], others: list[dict]) -> None:
    """The same data, and losses that differ by the order of sums at most."""
    assert column(lines, "data_hash") == column(others, "data_hash")
    for key in ("loss", "next_loss", "val_loss"):
        values = (column(part, key) for part in (lines, others))
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-5, atol=0)


def column(lines: list[dict], key: str) -> list:
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize("family", TINY)
def test_family_learns_resumes_bit_for_bit_and_changes_world_and_stage(tiny, corpus: Path, family: str):
    lines = whole_and_killed(tiny, corpus, family, STAGES[family], 2)
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert lines[-1]["val_loss"] < 0.95 * lines[0]["loss"]
    for workers, zero, stop in ((1, 0, 2), (2, 1, 4), (1, 2, 6), (2, 3, None)):
        part = tiny(family, f"zero={zero}", f"cluster.workers={workers}", name="moving")
        assert set(gloo_ranks.train_world(part, corpus, stop and {"event": "step", "step": stop})) == {
            "stopped" if stop else "done"
        }
    agree(lines, gloo_ranks.metrics(part))


def test_lstm_gradients_at_stage_2_belong_to_their_parameters(tiny, corpus: Path):
    """They were added to each other's: they came in another order on each rank, and ZeRO 2 fills its buckets as they
    come.
    """
    one, two = (tiny("lstm", "zero=2", f"cluster.workers={n}", "steps=2", name=f"workers{n}") for n in (1, 2))
    for config in (one, two):
        gloo_ranks.train_world(config, corpus)
    agree(gloo_ranks.metrics(one), gloo_ranks.metrics(two))
    norms = [column(gloo_ranks.metrics(config), "grad_norm") for config in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "stage"), itertools.product(("gpt", *TINY), range(4)))
def test_family_has_the_same_losses_in_every_stage_and_world(tiny, corpus: Path, family: str, stage: int):
    agree(*(whole_and_killed(tiny, corpus, family, stage, workers) for workers in (1, 2)))
