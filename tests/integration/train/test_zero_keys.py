"""The keys of ``zero`` on real gloo ranks: they change how ranks exchange, and not what they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks


def losses(make, corpus: Path, *keys: str) -> list[float]:
    name = "-".join(keys).replace("=", "-")
    config = make("cluster.workers=2", "save_every=0", "batch.micro=1", "optimizer.clip=0.5", *keys, name=name)
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    return [line["loss"] for line in gloo_ranks.metrics(config)]


@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_exchange_of_gradients_changes_no_loss(make, corpus: Path, zero: str):
    plain = losses(make, corpus, f"zero={zero}")
    assert losses(make, corpus, f"zero={zero}", "zero.overlap=true") == plain
    buckets = losses(make, corpus, f"zero={zero}", "zero.bucket_mb=1", "model.width=64")
    whole = losses(make, corpus, f"zero={zero}", "model.width=64")
    torch.testing.assert_close(torch.tensor(buckets), torch.tensor(whole), rtol=1e-6, atol=0)


def test_gathers_of_stage_3_change_no_loss_also_after_a_resume(make, corpus: Path):
    plain = losses(make, corpus, "zero=3")
    assert losses(make, corpus, "zero=3", "zero.prefetch_mb=0") == plain
    config = make("cluster.workers=2", "batch.micro=1", "optimizer.clip=0.5", "zero=3", "zero.hpz=2", name="hpz")
    assert gloo_ranks.train_world(config, corpus, {"event": "step", "step": 3}) == ["stopped", "stopped"]
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    assert [line["loss"] for line in gloo_ranks.metrics(config)] == plain


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_sum_of_bf16_gradients_over_ranks_is_as_exact_as_asked(make, corpus: Path, zero: str):
    auto = losses(make, corpus, f"zero={zero}", "precision=bf16")
    rounded = losses(make, corpus, f"zero={zero}", "precision=bf16", "zero.comm_dtype=bf16")
    assert auto[0] == rounded[0]
    torch.testing.assert_close(torch.tensor(auto), torch.tensor(rounded), rtol=1e-2, atol=0)
