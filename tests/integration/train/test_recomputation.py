"""Recomputed activations on real gloo ranks: the same losses whatever is recomputed, in every stage and world."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers import gloo_ranks

WAYS = (
    "model.checkpoint_activations=true",
    "model.checkpoint_activations=attention",
    "model.checkpoint_activations=mlp",
    "model.checkpoint_activations=true model.checkpoint_blocks=2",
    "model.checkpoint_activations=mlp model.checkpoint_blocks=[1]",
)


@pytest.mark.parametrize(("workers", "zero"), [(2, "0"), (2, "3"), (4, "2")])
def test_recomputation_changes_no_bit_of_a_loss(make, corpus: Path, workers: int, zero: str):
    curves = []
    for number, way in enumerate(("", *WAYS)):
        fixed = (f"cluster.workers={workers}", f"zero={zero}", "steps=4", "eval_every=0", "save_every=0")
        config = make(*fixed, *way.split(), "model.dropout=0.1", name=str(number))
        assert gloo_ranks.train_world(config, corpus) == ["done"] * workers
        curves.append([line["loss"] for line in gloo_ranks.metrics(config)])
    assert all(before == after for before, after in itertools.pairwise(curves))


def test_resume_may_recompute_otherwise(make, corpus: Path):
    whole = make(name="whole")
    gloo_ranks.train_world(whole, corpus)
    assert gloo_ranks.train_world(make(name="parts"), corpus, {"event": "step", "step": 3}) == ["stopped", "stopped"]
    parts = make("model.checkpoint_activations=mlp", "model.checkpoint_blocks=2", name="parts")
    assert gloo_ranks.train_world(parts, corpus) == ["done", "done"]
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)
