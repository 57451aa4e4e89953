"""A run end to end, on real gloo ranks and the real engine: what it promises of its numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.loader import loaders
from train.distributed.process_group import DistContext


def test_run_trains_evaluates_and_writes_its_files(make, corpus: Path):
    config = make("cluster.workers=2", "steps=12")
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    lines = gloo_ranks.metrics(config)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"step", "loss", "lr", "grad_norm", "tokens", "data_hash"} <= lines[0].keys()
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 12]
    assert lines[-1]["val_loss"] < lines[3]["val_loss"]
    folder = Path(config.run.dir or "")
    assert (folder / "checkpoints" / "latest").read_text() == "step_12"
    assert {"config.yaml", "summary.json", "tokenizer.json", "environment.json"} <= {f.name for f in folder.iterdir()}


def test_losses_are_the_same_in_every_stage_and_world(make, corpus: Path):
    curves = {}
    for stage, workers in itertools.product((0, 1, 2, 3), (1, 2)):
        config = make(
            f"zero={stage}", f"cluster.workers={workers}", "steps=20", "save_every=0", name=f"z{stage}w{workers}"
        )
        gloo_ranks.train_world(config, corpus)
        curves[stage, workers] = [line["loss"] for line in gloo_ranks.metrics(config)]
    expected = torch.tensor(curves[0, 1])
    for losses in curves.values():
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("zero", ["0", "2", "3"])
def test_stopped_run_resumes_bit_for_bit(make, corpus: Path, zero: str):
    whole = make(f"zero={zero}", "cluster.workers=2", "model.dropout=0.1", name="whole")
    parts = make(f"zero={zero}", "cluster.workers=2", "model.dropout=0.1", name="parts")
    assert gloo_ranks.train_world(whole, corpus) == ["done", "done"]
    assert gloo_ranks.train_world(parts, corpus, {"event": "step", "step": 3}) == ["stopped", "stopped"]
    assert gloo_ranks.train_world(parts, corpus) == ["done", "done"]
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)
    expected, found = gloo_ranks.state(whole, 8), gloo_ranks.state(parts, 8)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_stop_during_evaluation_loses_no_metrics_line(make, corpus: Path):
    whole, parts = make(name="whole"), make(name="parts")
    gloo_ranks.train_world(whole, corpus)
    assert gloo_ranks.train_world(parts, corpus, {"event": "phase", "name": "eval"}) == ["stopped", "stopped"]
    assert [line["step"] for line in gloo_ranks.metrics(parts)] == [1, 2, 3]
    assert gloo_ranks.train_world(parts, corpus) == ["done", "done"]
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)


def test_run_resumes_in_another_world_size_and_stage(make, corpus: Path):
    whole = make("cluster.workers=2", "zero=2", "steps=9", name="whole")
    gloo_ranks.train_world(whole, corpus)
    for workers, zero, stop in ((2, 2, 3), (1, 3, 6), (2, 1, None)):
        part = make(f"cluster.workers={workers}", f"zero={zero}", "steps=9", name="parts")
        end = gloo_ranks.train_world(part, corpus, stop and {"event": "step", "step": stop})
        assert set(end) == {"stopped" if stop else "done"}
    found, expected = gloo_ranks.metrics(part), gloo_ranks.metrics(whole)
    assert column(found, "data_hash") == column(expected, "data_hash")
    losses = [torch.tensor(column(lines, "loss")) for lines in (found, expected)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def column(lines: list[dict], key: str) -> list:
    return [line[key] for line in lines]


def test_evaluation_is_equal_for_any_world_size(make, corpus: Path):
    found = set()
    for workers in (1, 2, 3):
        config = make(f"cluster.workers={workers}", "steps=1", "optimizer.lr=1e-9", name=f"w{workers}")
        gloo_ranks.train_world(config, corpus)
        found.add(round(gloo_ranks.metrics(config)[-1]["val_loss"], 9))
    assert len(found) == 1


@pytest.mark.parametrize("zero", ["0", "1", "3"])
def test_non_finite_gradients_are_skipped_and_end_the_run_with_a_reason(make, corpus: Path, zero: str):
    wild = ("optimizer.lr=1e30", "optimizer.clip=0", "optimizer.max_skipped=3", "spikes.watch=off")
    config = make(f"zero={zero}", *wild, "cluster.workers=2")
    ends = gloo_ranks.train_world(config, corpus)
    assert all("3 updates in a row" in end and "optimizer.lr" in end for end in ends)


def test_learning_rate_far_too_high_is_not_blamed_on_the_data(make, corpus: Path):
    """Where weights are merely huge, their loss is a number and only the gradient is none: nothing but age tells it
    from poison.
    """
    wild = ("optimizer.lr=1e4", "optimizer.max_skipped=3", "steps=40")
    [end] = gloo_ranks.train_world(make("zero=0", *wild, "cluster.workers=1"), corpus)
    assert "lower optimizer.lr" in end
    assert "take them out" not in end


def test_ranks_with_different_configurations_refuse_to_start(make, corpus: Path):
    ranks = gloo_ranks.run(2, differing, configuration.to_dict(make("cluster.workers=2")), str(corpus))
    assert all("the workers do not agree on the configuration" in text and "rank 1" in text for text in ranks)


def differing(world, emit, config, folder) -> str:
    return gloo_ranks.train(world, emit, {**config, "seed": world.rank}, folder)


@pytest.mark.parametrize(
    ("workers", "here", "micro", "micro_batches"),
    [(3, 3, 2, 1), (3, 2, 2, 2), (4, 2, 2, 2), (6, 1, 1, 6), (4, 4, 2, 1)],
)
def test_fewer_workers_take_more_micro_batches_of_the_usual_size(make, corpus, workers, here, micro, micro_batches):
    config = make(f"cluster.workers={workers}", "batch.global=6")
    loader, _ = loaders(Corpus(corpus), config, DistContext(0, here, 0, torch.device("cpu")))
    assert (loader.micro, loader.micro_batches) == (micro, micro_batches)


@pytest.mark.parametrize("model", ["gpt_tiny", "lstm_tiny", "t5_tiny"])
def test_samples_are_the_same_in_every_stage_and_world(corpus: Path, tmp_path: Path, model: str):
    texts = []
    sgd = ("optimizer=sgd", "optimizer.lr=0.1")  # Adam would make a step of any gradient that is all rounding
    for zero, workers in (("0", 1), ("2", 2), ("3", 2)):
        files = ("data.paths=[x]", f"data.dir={corpus}", f"run.dir={tmp_path}/{zero}")
        keys = (f"cluster.workers={workers}", f"zero={zero}", "generation.prompts=[the,a]", "generation.max_tokens=8")
        fixed = [f"experiment={model}", *sgd, *gloo_ranks.TEXT, "steps=4", "save_every=0"]
        config = configuration.load([*fixed, *files, *keys])
        arguments = configuration.to_dict(config), str(corpus)
        ranks = gloo_ranks.start(workers, gloo_ranks.train, *arguments).wait()
        assert [rank.result for rank in ranks] == ["done"] * workers
        texts.append([e["text"] for e in ranks[0].events if e["event"] == "sample"])
        assert all(e["event"] != "sample" for rank in ranks[1:] for e in rank.events)
    assert len(texts[0]) == 2
    assert texts[1:] == texts[:1] * 2


def counting_draws(world, emit, config, corpus, stop_when=None) -> tuple[str, int]:
    """Train, and count the parameters whose weights are drawn."""
    from train.util import seeding

    drawn, generator = [], seeding.generator

    def counted(*key):
        if "init" in key:
            drawn.append(key)
        return generator(*key)

    seeding.generator = counted
    return gloo_ranks.train(world, emit, config, corpus, stop_when), len(drawn)


def test_resumed_run_draws_no_weights(make, corpus: Path):
    config = make("cluster.workers=1")
    arguments = configuration.to_dict(config), str(corpus)
    [(end, drawn)] = gloo_ranks.run(1, counting_draws, *arguments, {"event": "step", "step": 3})
    assert end == "stopped"
    assert drawn > 0
    assert gloo_ranks.run(1, counting_draws, *arguments) == [("done", 0)]
