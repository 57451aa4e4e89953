"""A ramp of the batch size on real gloo ranks: the same losses in every world, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

RAMP = ("batch.global=16", "batch.ramp=[[4,3],[8,6]]", "steps=9", "eval_every=0", "save_every=0")


def column(config, key: str) -> list:
    return [line[key] for line in gloo_ranks.metrics(config)]


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_ramp_trains_the_same_in_every_world_and_micro_batch(make, corpus: Path, zero: str):
    expected: list[float] = []
    for workers, micro in ((1, "null"), (2, "1"), (4, "null"), (4, "1")):
        name = f"{workers}-{micro}"
        config = make(*RAMP, f"cluster.workers={workers}", f"batch.micro={micro}", f"zero={zero}", name=name)
        assert gloo_ranks.train_world(config, corpus) == ["done"] * workers
        losses = column(config, "loss")
        expected = expected or losses
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
        assert column(config, "tokens") == [64, 128, 192, 320, 448, 576, 832, 1088, 1344]


def test_ramp_begins_as_a_run_of_its_first_size_does(make, corpus: Path):
    ramp = make(*RAMP, name="ramp")
    alone = make(*RAMP[2:], "batch.global=4", "data.streams=4", name="alone")
    for config in (ramp, alone):
        assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    assert column(ramp, "loss")[:3] == column(alone, "loss")[:3]
    assert column(ramp, "data_hash")[:3] == column(alone, "data_hash")[:3]
    assert column(ramp, "loss")[3] != column(alone, "loss")[3]


@pytest.mark.parametrize("zero", ["0", "2", "3"])
def test_ramp_stopped_in_any_stage_resumes_bit_for_bit(make, corpus: Path, zero: str):
    whole, parts = (make(*RAMP, f"zero={zero}", "batch.micro=2", name=name) for name in ("whole", "parts"))
    assert gloo_ranks.train_world(whole, corpus) == ["done", "done"]
    for step in (2, 5, 7):
        assert gloo_ranks.train_world(parts, corpus, {"event": "step", "step": step}) == ["stopped", "stopped"]
    assert gloo_ranks.train_world(parts, corpus) == ["done", "done"]
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)
    expected, found = gloo_ranks.state(whole, 9), gloo_ranks.state(parts, 9)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_ramp_goes_on_in_another_world(make, corpus: Path):
    whole = make(*RAMP, "zero=2", name="whole")
    gloo_ranks.train_world(whole, corpus)
    for workers, zero, stop in ((4, 2, 2), (1, 3, 5), (2, 1, None)):
        part = make(*RAMP, f"cluster.workers={workers}", f"zero={zero}", name="parts")
        end = gloo_ranks.train_world(part, corpus, stop and {"event": "step", "step": stop})
        assert set(end) == {"stopped" if stop else "done"}
    assert column(part, "data_hash") == column(whole, "data_hash")
    torch.testing.assert_close(*(torch.tensor(column(c, "loss")) for c in (part, whole)), rtol=1e-5, atol=0)


def test_ramp_of_a_run_is_not_to_be_changed(make, corpus: Path):
    config = make(*RAMP)
    assert gloo_ranks.train_world(config, corpus, {"event": "step", "step": 2}) == ["stopped", "stopped"]
    [end, _] = gloo_ranks.train_world(make(*RAMP, "batch.ramp=[[4,4],[8,6]]"), corpus)
    assert "a run of another kind" in end
    assert "batch.ramp" in end
