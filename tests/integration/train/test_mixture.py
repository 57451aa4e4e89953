"""Runs on a mixture: whatever kills, worlds and new shares come, each step reads what an unbroken run reads."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from helpers import gloo_ranks

from train.config import load as configuration
from train.config.schema import Config
from train.data.mixing.prepare_sources import prepare_mixture
from train.data.prepare.prepare import prepare
from train.errors import UserError
from train.run_dir.mixture_stages import settle_mixture
from train.stability.find_documents import trace_step
from train.util.run_layout import RunDir

WORDS = {"code": "defnrtupasc()_=", "notes": "aeioumnrst", "talk": "AEIOUMNRST?!"}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """A folder of made-up documents for each source, in letters of its own."""
    draw, folders = random.Random(1), {}
    for name, letters in WORDS.items():
        folders[name] = tmp_path / "text" / name
        folders[name].mkdir(parents=True)
        for n in range(25):
            words = ["".join(draw.choices(letters, k=5)) for _ in range(draw.randint(3, 40))]
            (folders[name] / f"{n:02}.txt").write_text(" ".join(words))
    return folders


@pytest.fixture
def mixed(texts, tmp_path: Path, monkeypatch):
    """mixed(*overrides, name=...) -> (configuration of a run as its driver settles it, folder of its mixture)."""
    monkeypatch.chdir(tmp_path)

    def composed(*overrides: str, name: str = "run") -> tuple[Config, Path]:
        sources = ", ".join(f"{source}: {{paths: [{folder}]}}" for source, folder in texts.items())
        text = [override for override in gloo_ranks.TEXT if override != "data=text"]
        keys = [
            "data=mix",
            *text,
            "data.workers=1",
            f"data.sources={{{sources}}}",
            f"run.dir={tmp_path / name}",
            *overrides,
        ]
        bounded = "seq2seq" not in " ".join(overrides)  # t5 has no longest row
        tiny = [override for override in gloo_ranks.TINY if bounded or override != "model.max_len=32"]
        config = configuration.load([*tiny, *keys])
        folder = prepare_mixture(config.data, lambda data: prepare(data, lambda event: None))
        return settle_mixture(config, str(folder), lambda text: None), folder

    return composed


def hashes(config: Config) -> dict[int, str]:
    """The data_hash of each step of a run; a step that comes twice in its metrics is an error."""
    lines = gloo_ranks.metrics(config)
    by_step = {line["step"]: line["data_hash"] for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def kill_after(config: Config, folder: Path, step: int) -> None:
    """Trains, and kills all ranks with SIGKILL once a checkpoint of ``step`` or later is complete."""
    checkpoints = RunDir(Path(config.run.dir or "")).checkpoints
    arguments = configuration.to_dict(config), str(folder), None
    running = gloo_ranks.start(config.cluster.worker_count, gloo_ranks.train, *arguments)
    deadline = time.monotonic() + 100
    while not any(int(p.name.partition("_")[2]) >= step for p in checkpoints.glob("step_*") if p.name[5:].isdigit()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.kill()
    running.wait()


STAGES = [
    "{until: 12, weights: {code: 3, notes: 1}}",
    "{until: 20, weights: {code: 1, notes: 1, talk: 2}}",
    "{weights: {notes: 1, talk: 1}}",
]
NEW_STAGE = "{weights: {code: 5, talk: 1}}"
LENGTH = ["steps=30", "save_every=2", "eval_every=10"]


@pytest.mark.slow
def test_broken_run_with_new_shares_reads_what_an_unbroken_one_reads(mixed):
    given = f"data.stages=[{', '.join(STAGES)}]"
    changed = f"data.stages=[{STAGES[0]}, {STAGES[1].replace('20', '24')}, {NEW_STAGE}]"
    first, folder = mixed(given, *LENGTH, "cluster.workers=2", name="broken")
    kill_after(first, folder, 6)
    alone, _ = mixed(given, *LENGTH, "cluster.workers=1", name="broken")
    kill_after(alone, folder, 14)
    with pytest.raises(UserError, match=r"data\.reweight=true"):
        mixed(changed, *LENGTH, "cluster.workers=3", name="broken")
    third, _ = mixed(changed, *LENGTH, "cluster.workers=3", "data.reweight=true", name="broken")
    kill_after(third, folder, 22)
    again, _ = mixed(changed, *LENGTH, "cluster.workers=3", "data.reweight=true", name="broken")
    assert again.data.stages == third.data.stages
    assert gloo_ranks.train_world(again, folder) == ["done"] * 3

    words = ", ".join(f"{{until: {s.until or 1.0}, weights: {s.weights}}}".replace("'", "") for s in third.data.stages)
    whole, _ = mixed(f"data.stages=[{words}]", *LENGTH, "cluster.workers=2", name="whole")
    assert gloo_ranks.train_world(whole, folder) == ["done"] * 2
    assert hashes(again) == hashes(whole)
    assert list(hashes(again)) == list(range(1, 31))
    read = [(part.document, part.epoch, part.tokens) for step in range(1, 31) for part in parts_of(again, step)]
    assert len(set(read)) == len(read)


def parts_of(config: Config, step: int):
    """The documents of a step, after its data_hash was compared with the one in metrics.jsonl."""
    data_hash, parts = trace_step(Path(config.run.dir or ""), step)
    assert data_hash == hashes(config)[step]
    return parts


def test_metrics_tell_tokens_epochs_and_held_out_loss_of_each_source(mixed):
    weights = "data.stages=[{until: 4, weights: {code: 3, notes: 1}}, {weights: {talk: 1}}]"
    config, folder = mixed(weights, "cluster.workers=2")
    assert gloo_ranks.train_world(config, folder) == ["done"] * 2
    lines = gloo_ranks.metrics(config)
    assert [line["tokens/code"] for line in lines] == [48, 96, 144, 192, 192, 192, 192, 192]
    assert [line["tokens/notes"] for line in lines] == [16, 32, 48, 64, 64, 64, 64, 64]
    assert [line["tokens/talk"] for line in lines] == [0, 0, 0, 0, 64, 128, 192, 256]
    last = lines[-1]
    assert last["val_loss/talk"] < lines[3]["val_loss/talk"]
    assert last["epochs/talk"] > 0
    assert last["loss/talk"] == pytest.approx(last["loss"])
    assert lines[0]["loss"] == pytest.approx((3 * lines[0]["loss/code"] + lines[0]["loss/notes"]) / 4)
    assert lines[0]["loss/talk"] is None
    summary = json.loads(RunDir(Path(config.run.dir or "")).summary.read_text())
    told = [key for key in last if key.startswith(("tokens/", "epochs/", "val_loss/"))]
    assert len(told) == 9
    assert {key: summary[key] for key in told}.items() <= last.items()
    by_source = [last[f"val_loss/{name}"] for name in WORDS]
    assert min(by_source) < last["val_loss"] < max(by_source)
    for step, sources in ((2, {"code", "notes"}), (7, {"talk"})):
        names = [part.document.partition("/")[0] for part in parts_of(config, step)]
        assert set(names) == sources


@pytest.mark.parametrize("objective", [["objective=masked", "model=bert_tiny"], ["objective=seq2seq", "model=t5_tiny"]])
def test_other_objectives_train_on_a_mixture(mixed, objective):
    config, folder = mixed(*objective, "model.layers=1", "steps=3", "cluster.workers=1")
    assert gloo_ranks.train_world(config, folder) == ["done"]
    assert len(gloo_ranks.metrics(config)) == 3


def test_a_run_ends_with_its_sources_where_they_are_not_repeated(mixed):
    config, folder = mixed("data.exhausted=drop", "steps=5000", "save_every=0", "cluster.workers=1")
    assert 20 < config.steps < 5000
    assert gloo_ranks.train_world(config, folder) == ["done"]
    last = gloo_ranks.metrics(config)[-1]
    assert [last[f"epochs/{name}"] for name in WORDS] == [1, 1, 1]
    again, _ = mixed("data.exhausted=drop", "steps=5000", "save_every=0", "cluster.workers=1")
    assert again == config
