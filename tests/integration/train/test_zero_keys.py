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


def test_gathers_inside_hosts_change_no_loss_and_no_checkpoint(make, corpus: Path):
    """Two hosts of two ranks: the backward pass gathers from a second copy that each host has of its own."""
    four = ("cluster.workers=4", "batch.global=8", "optimizer.clip=0.5", "zero=3", "steps=6", "save_every=3")
    plain = make(*four, name="plain")
    inside = make(*four, "zero.hpz=2", name="inside")
    assert gloo_ranks.train_world(plain, corpus) == ["done"] * 4
    assert gloo_ranks.train_world(inside, corpus, {"event": "step", "step": 4}) == ["stopped"] * 4
    first, second = gloo_ranks.state(inside, 3), gloo_ranks.state(plain, 3)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert first.keys() == second.keys()
    assert gloo_ranks.train_world(inside, corpus) == ["done"] * 4
    assert gloo_ranks.metrics(inside) == gloo_ranks.metrics(plain)


def test_checkpoint_of_ranks_in_hosts_goes_on_in_any_world(make, corpus: Path):
    plain = losses(make, corpus, "zero=3")
    for workers, keys, stop in ((4, ("zero.hpz=2",), 2), (2, (), 5), (4, ("zero.hpz=4",), None)):
        part = make(*keys, f"cluster.workers={workers}", "zero=3", "optimizer.clip=0.5", "batch.micro=1", name="parts")
        ends = gloo_ranks.train_world(part, corpus, stop and {"event": "step", "step": stop})
        assert set(ends) == {"stopped" if stop else "done"}
    found = [line["loss"] for line in gloo_ranks.metrics(part)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_sum_of_bf16_gradients_over_ranks_is_as_exact_as_asked(make, corpus: Path, zero: str):
    auto = losses(make, corpus, f"zero={zero}", "precision=bf16")
    rounded = losses(make, corpus, f"zero={zero}", "precision=bf16", "zero.comm_dtype=bf16")
    assert auto[0] == rounded[0]
    torch.testing.assert_close(torch.tensor(auto), torch.tensor(rounded), rtol=1e-2, atol=0)
