"""Poison and faults in real runs: what is left out, that nothing else changes, and when the run gives up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration
from train.config.schema import Config
from train.data.prepare.prepare import prepare
from train.util.io import read_records

GARBAGE = random.Random(1).choices("!$%&()*+-/:;<=>?@[]^_{|}0123456789", k=240)
POISON = "".join("~" if n % 8 == 0 else sign for n, sign in enumerate(GARBAGE)) + "~"
"""Every row of it holds a "~"."""
UNTIED = ("seed=4", "model.tied=false", "eval_every=0", "steps=36", "save_every=6", "spikes.window=8")
SPIKY = (
    *("seed=1", "cluster.workers=1", "eval_every=0", "steps=60", "save_every=10", "spikes.window=16"),
    *("optimizer=momentum", "optimizer.lr=0.3", "optimizer.clip=0"),
)


def written(folder: Path, odd: str) -> Path:
    """Forty documents of made-up words and one other, prepared."""
    text = folder / "text"
    text.mkdir(parents=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioumnrst", k=draw.randint(1, 7))) for _ in range(50)]
    for n in range(40):
        (text / f"{n:02}.txt").write_text(" ".join(draw.choices(words, k=draw.randint(3, 40))))
    (text / "odd.txt").write_text(odd)
    options = (*gloo_ranks.TEXT, "data.val_fraction=0", f"data.paths=[{text}]", f"data.dir={folder / 'corpus'}")
    return prepare(gloo_ranks.compose(*options).data, lambda event: None)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with one document of garbage."""
    return written(tmp_path_factory.mktemp("poisoned"), POISON)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same corpus with harmless text of the same length in its place."""
    return written(tmp_path_factory.mktemp("clean"), ("sane text of such words " * 20)[: len(POISON) - 1] + ".")


def huge_row(world, emit, config, corpus, stop_when=None) -> str:
    """Train with an embedding of "~" so large that every row with one overflows, and no other does."""
    from train.models.initial_weights import InitialWeights

    draw = InitialWeights.read

    def drawn(weights, name, start, numel):
        values = draw(weights, name, start, numel)
        if name == "backbone.embed.weight":
            width = weights.starts[name].shape[1]
            values[(torch.arange(start, start + numel) // width) == ord("~")] = 1e38
        return values

    InitialWeights.read = drawn
    return gloo_ranks.train(world, emit, config, corpus, stop_when)


def struck(world, emit, config, corpus) -> str:
    """Train, with a weight of rank 0 made infinite by nobody's fault after step 7."""
    from train.engine import engine

    train_step, made = engine.Engine.train_step, iter(range(1, 1000))

    def striking(self, *arguments):
        result = train_step(self, *arguments)
        if next(made) == 7 and world.is_rank0:
            piece = next(p for p in self.param_shards if "blocks" in p.name)
            piece.view_of(piece.holder)[0] = torch.inf  # the master weight: the next update spreads it
        return result

    engine.Engine.train_step = striking
    return gloo_ranks.train(world, emit, config, corpus)


def run(function, config: Config, corpus: Path, *more) -> list[str]:
    return gloo_ranks.run(config.cluster.workers, function, configuration.to_dict(config), str(corpus), *more)


def ledger(config: Config) -> list[dict]:
    return read_records(Path(config.run.dir or "") / "skipped.jsonl")


def with_ledger_of(config: Config, other: Config) -> Config:
    """``config``, in whose folder the lines of another run stand from the beginning."""
    folder = Path(config.run.dir or "")
    folder.mkdir(parents=True)
    (folder / "skipped.jsonl").write_text((Path(other.run.dir or "") / "skipped.jsonl").read_text())
    return config


def assert_same_run(found: Config, expected: Config, step: int, but: tuple[str, ...] = ()) -> None:
    lines = [gloo_ranks.metrics(found), gloo_ranks.metrics(expected)]
    for line in (*lines[0], *lines[1]):
        for key in but:
            line.pop(key, None)
    assert lines[0] == lines[1]
    a, b = gloo_ranks.state(found, step), gloo_ranks.state(expected, step)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("zero", ["0", "2", "3"])
def test_rows_with_infinite_loss_are_masked_and_nothing_else_changes(tmp_path, poisoned, clean, zero):
    keys = (*UNTIED, f"zero={zero}", "cluster.workers=2")
    hit, plan = (gloo_ranks.on_corpus(poisoned, tmp_path / name, *keys) for name in ("hit", "plan"))
    assert run(huge_row, hit, poisoned) == ["done", "done"]
    (entry,) = ledger(hit)
    assert (entry["kind"], entry["how"], entry["back_to"]) == ("non-finite", "in place", entry["step"] - 1)
    assert "odd.txt" in [document["source"] for document in entry["documents"]]
    assert entry["layers"][0].startswith("backbone.")
    assert run(huge_row, with_ledger_of(plan, hit), poisoned) == ["done", "done"]
    assert_same_run(hit, plan, 36)
    if zero == "0":
        never = with_ledger_of(gloo_ranks.on_corpus(clean, tmp_path / "never", *keys), hit)
        assert run(huge_row, never, clean) == ["done", "done"]
        assert_same_run(hit, never, 36)


def test_skipped_rows_stay_masked_in_another_world_size(tmp_path, poisoned):
    whole, parts = (
        gloo_ranks.on_corpus(poisoned, tmp_path / n, *UNTIED, "cluster.workers=2") for n in ("whole", "parts")
    )
    run(huge_row, whole, poisoned)
    (entry,) = ledger(whole)
    stop = {"event": "step", "step": entry["step"] + 1}
    assert run(huge_row, parts, poisoned, stop) == ["stopped", "stopped"]
    alone = gloo_ranks.on_corpus(poisoned, tmp_path / "parts", *UNTIED, "cluster.workers=1", "zero=3")
    assert run(huge_row, alone, poisoned) == ["done"]
    assert [e["skipped"] for e in ledger(parts)] == [entry["skipped"]]
    found, expected = gloo_ranks.metrics(alone), gloo_ranks.metrics(whole)
    hashes = [line["data_hash"] for line in expected]
    assert [line["data_hash"] for line in found] == hashes
    torch.testing.assert_close(found[-1]["loss"], expected[-1]["loss"], rtol=1e-5, atol=0)


def test_spike_rolls_back_masks_its_document_and_changes_nothing_else(tmp_path, poisoned, clean):
    hit, never, unaware = (
        gloo_ranks.on_corpus(corpus, tmp_path / name, *SPIKY, *more)
        for corpus, name, more in (
            (poisoned, "hit", ()),
            (clean, "never", ()),
            (poisoned, "unaware", ("spikes.watch=off",)),
        )
    )
    assert run(gloo_ranks.train, hit, poisoned) == ["done"]
    entry = ledger(hit)[0]
    assert (entry["kind"], entry["how"]) == ("spike", "rolled back")
    assert entry["back_to"] < entry["step"]
    assert "odd.txt" in [document["source"] for document in entry["documents"]]
    assert len(entry["documents"]) <= 3
    assert [line["step"] for line in gloo_ranks.metrics(hit)] == list(range(1, 61))
    assert run(gloo_ranks.train, with_ledger_of(never, hit), clean) == ["done"]
    assert_same_run(hit, never, 60)
    assert run(gloo_ranks.train, unaware, poisoned) == ["done"]
    assert not ledger(unaware)


def test_corrupted_weights_roll_back_to_a_sound_checkpoint(tmp_path, clean):
    config = gloo_ranks.on_corpus(clean, tmp_path / "run", *UNTIED, "cluster.workers=2", "zero=2")
    assert run(struck, config, clean) == ["done", "done"]
    (entry,) = ledger(config)
    assert (entry["step"], entry["how"], entry["back_to"]) == (9, "rolled back", 6)
    plan = with_ledger_of(
        gloo_ranks.on_corpus(clean, tmp_path / "plan", *UNTIED, "cluster.workers=2", "zero=2"), config
    )
    assert run(gloo_ranks.train, plan, clean) == ["done", "done"]
    assert_same_run(config, plan, 36)


def test_model_that_fails_on_any_data_ends_the_run_with_a_reason(tmp_path, clean):
    keys = (
        "optimizer.lr=1e30",
        "optimizer.clip=0",
        "cluster.workers=2",
        "steps=40",
        "save_every=0",
        "spikes.max_rollbacks=2",
    )
    config = gloo_ranks.on_corpus(clean, tmp_path / "run", *keys)
    ends = run(gloo_ranks.train, config, clean)
    assert all("3 times in a row" in end and "optimizer.lr" in end for end in ends)
    assert len(ledger(config)) == 3


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("steps=4",), "none of the 4 steps made an update, since the numbers were not finite, first at step 2"),
        (("steps=1",), "after step 1, the last, the held-out loss is not finite"),
        (("steps=3", "spikes.watch=off", "model.init_std=1e30"), "since no gradient was finite"),
        (("steps=3", "model.init_std=1e39"), "begins with weights that are not finite, in backbone.embed.weight"),
    ],
    ids=["all left out", "the last update", "all skipped", "weights"],
)
def test_run_that_trained_nothing_fails_and_names_the_step(make, corpus: Path, keys: tuple[str, ...], words: str):
    config = make("cluster.workers=1", "eval_every=0", "save_every=0", "optimizer.lr=1e20", *keys)
    assert words in gloo_ranks.train_world(config, corpus)[0]
    folder = Path(config.run.dir or "")
    assert not (folder / "summary.json").exists()
    assert not list(folder.glob("checkpoints/step_*"))
