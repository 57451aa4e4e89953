"""Saving behind the steps: of one moment whatever the steps do meanwhile, failing on all ranks together, never for ever."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gloo_ranks
from safetensors.torch import load_file

from train.checkpoint import staging
from train.checkpoint.reader import complete
from train.config import load as configuration
from train.run_dir.open_run import open_run

NEVER = bool  # called, it is False


def test_a_snapshot_is_a_safetensors_file_and_its_memory_is_used_again(tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    mine = staging.StagingBuffer(torch.device("cpu"))
    memory = None
    for sizes in ([1, 4096, 5_000_003, 7], [4_000_000], [3]):
        states = {("weight", f"p{n}", 10 * n): torch.randn(size, generator=draw) for n, size in enumerate(sizes)}
        mine.begin_copy(states)
        mine.copy()
        assert memory is None or mine.memory is memory
        memory = mine.memory
        entry = mine.write_file(tmp_path / "file", NEVER)
        found = load_file(tmp_path / "file")
        assert found.keys() == {staging.tensor_name(*which) for which in states}
        assert all(torch.equal(found[staging.tensor_name(*which)], view) for which, view in states.items())
        assert entry["size"] == (tmp_path / "file").stat().st_size
        assert entry["pieces"] == [[*which, view.numel()] for which, view in states.items()]


def test_a_file_system_that_wants_nothing_past_its_cache_is_written_through_it(tmp_path: Path):
    data = memoryview(np.random.default_rng(0).bytes(100_001))[1:]  # of no address and size that O_DIRECT takes
    with staging._open_direct(tmp_path / "file") as fd:
        staging._write_all(fd, data)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_what_is_saved_is_of_its_step_though_the_next_is_under_way(make, corpus: Path, zero: str):
    config = make(f"zero={zero}", "cluster.workers=2")
    assert gloo_ranks.run(2, save_while_a_step_is_made, configuration.to_dict(config), str(corpus)) == [[], []]


def save_while_a_step_is_made(world, emit, config, corpus: str):
    """The pieces that this rank saved with other values than they had at the moment of the save."""
    from train.checkpoint.writer import CheckpointWriter
    from train.data.corpus.shards import Corpus
    from train.data.loader import loaders
    from train.run import build_engine
    from train.state.train_state import TrainState

    config = configuration.parse(config)
    loader, _ = loaders(Corpus(corpus), config, world)
    engine, _ = build_engine(config, Corpus(corpus).tokenizer.vocab_size, world, loader)
    saver = CheckpointWriter(Path(config.run.dir or "") / "checkpoints", 1, 0, world)
    passed, take = threading.Event(), saver.staging.copy

    def take_late():
        passed.wait(30)
        time.sleep(0.05)
        take()

    def hold():
        passed.set()  # forward and backward
        saver.wait_for_staging()

    engine.train_step(next(loader)[0], {"loss": 64}, 1e-2, saver.wait_for_staging)
    pieces = saver._own_shards(engine)
    expected = {
        staging.tensor_name(kind, p.name, p.start): v.clone() for p in pieces for kind, v in engine.states(p).items()
    }
    saver.staging.copy = take_late
    saver.save(engine, TrainState(step=1), None, {}, lambda: None)
    engine.train_step(next(loader)[0], {"loss": 64}, 1e-2, hold)
    after = {staging.tensor_name(kind, p.name, p.start): v for p in pieces for kind, v in engine.states(p).items()}
    saver.wait_for_save()
    loader.close()
    found = {}
    for file in (saver.folder / "step_1").glob("rank_*"):
        found |= load_file(file)
    assert not all(torch.equal(after[name], expected[name]) for name in expected)
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def test_a_failed_completion_ends_every_rank_at_the_next_step(make, corpus: Path):
    config = make("cluster.workers=2", "steps=500", "save_every=2", "eval_every=0", "log_every=100")
    folder = Path(config.run.dir) / "checkpoints"
    (folder / "latest" / "in the way").mkdir(parents=True)  # ``latest`` can not be moved there
    ends = gloo_ranks.train_world(config, corpus)
    assert all("no checkpoint could be written" in text and "latest" in text for text in ends)
    assert len(gloo_ranks.metrics(config)) < 400


@pytest.mark.parametrize("last", [False, True])
def test_a_rank_that_is_killed_while_saving_leaves_nobody_waiting(make, corpus: Path, last: bool):
    """In the middle of the run, and at its end, where the others only wait for the save."""
    config = make("cluster.workers=2", "steps=40", "save_every=1", "eval_every=0")
    folder = Path(config.run.dir) / "checkpoints"
    running = gloo_ranks.start(2, gloo_ranks.train, configuration.to_dict(config), str(corpus))
    want = f".step_{40 if last else 9}.*.saving"
    while not list(folder.glob(want)):
        assert running.processes[0].is_alive()
    running.kill(1)
    began = time.monotonic()
    survivor = running.wait(60)[0]
    assert survivor.code == (1 if survivor.error else 0)  # 0: it was saved before the kill
    assert time.monotonic() - began < 30
    assert all(c.damage() is None for c in complete(folder))
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]
    assert not list(folder.glob(".step_*"))
    assert complete(folder)[-1].progress.step == 40


def test_reading_goes_on_while_saves_come_and_go(make, corpus: Path):
    config = make("steps=40", "save_every=1", "keep_last=1", "keep_best=0", "eval_every=0", "cluster.workers=1")
    folder = Path(config.run.dir)
    with ThreadPoolExecutor() as pool:
        training = pool.submit(gloo_ranks.train_world, config, corpus)
        while not list(folder.glob("checkpoints/step_*")) and not training.done():
            time.sleep(0.01)
        steps = []
        while not training.done():
            steps.append(open_run(folder).checkpoint.progress.step)
        assert training.result() == ["done"]
    assert steps == sorted(steps)
    assert steps


def test_what_the_steps_waited_is_in_the_metrics_and_the_summary(make, corpus: Path):
    config = make("cluster.workers=2", "save_every=2")
    ranks = gloo_ranks.start(2, gloo_ranks.train, configuration.to_dict(config), str(corpus)).wait()
    folder = Path(config.run.dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    waited = [line["save_stall_s"] for line in lines]
    assert waited[0] == 0
    assert 0 < sum(waited) <= json.loads((folder / "summary.json").read_text())["save_stall_s"] + 1e-3
    saves = [event for event in ranks[0].events if event["event"] == "save"]
    assert [event["step"] for event in saves] == [2, 4, 6, 8]
    assert all(os.path.isdir(event["path"]) for event in saves)  # noqa: PTH112
    assert all(event["stall_s"] > 0 for event in saves)
