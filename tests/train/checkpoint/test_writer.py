"""Asynchronous saves: consistent while steps go on, failing on all ranks together, never hanging."""

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

NEVER = bool  # bool() is False


def test_staging_buffer_writes_safetensors_and_reuses_its_memory(tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    buffer = staging.StagingBuffer(torch.device("cpu"))
    memory = None
    for sizes in ([1, 4096, 5_000_003, 7], [4_000_000], [3]):
        states = {("weight", f"p{n}", 10 * n): torch.randn(size, generator=draw) for n, size in enumerate(sizes)}
        buffer.begin_copy(states)
        buffer.copy()
        assert memory is None or buffer.memory is memory
        memory = buffer.memory
        entry = buffer.write_file(tmp_path / "file", NEVER)
        loaded = load_file(tmp_path / "file")
        assert loaded.keys() == {staging.tensor_name(*key) for key in states}
        assert all(torch.equal(loaded[staging.tensor_name(*key)], view) for key, view in states.items())
        assert entry["size"] == (tmp_path / "file").stat().st_size
        assert entry["pieces"] == [[*key, view.numel()] for key, view in states.items()]


def test_write_falls_back_to_the_page_cache_without_direct_io(tmp_path: Path):
    data = memoryview(np.random.default_rng(0).bytes(100_001))[1:]  # address and size are not aligned for O_DIRECT
    with staging._open_direct(tmp_path / "file") as fd:
        staging._write_all(fd, data)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_saved_state_is_that_of_its_step_while_the_next_one_runs(make, corpus: Path, zero: str):
    config = make(f"zero={zero}", "cluster.workers=2")
    assert gloo_ranks.run(2, save_while_a_step_is_made, configuration.to_dict(config), str(corpus)) == [[], []]


def save_while_a_step_is_made(world, emit, config, corpus: str):
    """The pieces that this rank saved with values other than those at the moment of the save."""
    from train.checkpoint.writer import CheckpointWriter
    from train.data.corpus.shards import Corpus
    from train.data.loader import loaders
    from train.run import build_engine
    from train.state.train_state import TrainState

    config = configuration.parse(config)
    loader, _ = loaders(Corpus(corpus), config, world)
    engine, _ = build_engine(config, Corpus(corpus).tokenizer.vocab_size, world, loader)
    saver = CheckpointWriter(Path(config.run.dir or "") / "checkpoints", 1, 0, world)
    passes_done, copy = threading.Event(), saver.staging.copy

    def copy_late():
        passes_done.wait(30)
        time.sleep(0.05)
        copy()

    def wait_before_update():
        passes_done.set()  # forward and backward
        saver.wait_for_staging()

    engine.train_step(next(loader)[0], {"loss": 64}, 1e-2, saver.wait_for_staging)
    pieces = saver._own_shards(engine)
    expected = {name: view.clone() for name, view in named_states(engine, pieces).items()}
    saver.staging.copy = copy_late
    saver.save(engine, TrainState(step=1), None, {}, lambda: None)
    engine.train_step(next(loader)[0], {"loss": 64}, 1e-2, wait_before_update)
    after = named_states(engine, pieces)
    saver.wait_for_save()
    loader.close()
    saved = {}
    for file in (saver.folder / "step_1").glob("rank_*"):
        saved |= load_file(file)
    assert not all(torch.equal(after[name], expected[name]) for name in expected)
    return [name for name, value in expected.items() if not torch.equal(saved[name], value)]


def named_states(engine, pieces) -> dict[str, torch.Tensor]:
    """Views of all states of some pieces, by their names in a checkpoint's files."""
    states = {}
    for piece in pieces:
        for kind, view in engine.states(piece).items():
            states[staging.tensor_name(kind, piece.name, piece.start)] = view
    return states


def test_failed_publication_ends_every_rank_at_the_next_step(make, corpus: Path):
    config = make("cluster.workers=2", "steps=500", "save_every=2", "eval_every=0", "log_every=100")
    folder = Path(config.run.dir) / "checkpoints"
    (folder / "latest" / "in the way").mkdir(parents=True)  # ``latest`` can not be moved there
    ends = gloo_ranks.train_world(config, corpus)
    assert all("no checkpoint could be written" in text and "latest" in text for text in ends)
    assert len(gloo_ranks.metrics(config)) < 400


@pytest.mark.parametrize("last", [False, True])
def test_rank_killed_while_saving_leaves_no_rank_waiting(make, corpus: Path, last: bool):
    """In the middle of the run, and at its end, when the others only wait for the save."""
    config = make("cluster.workers=2", "steps=40", "save_every=1", "eval_every=0")
    folder = Path(config.run.dir) / "checkpoints"
    running = gloo_ranks.start(2, gloo_ranks.train, configuration.to_dict(config), str(corpus))
    pattern = f".step_{40 if last else 9}.*.saving"
    while not list(folder.glob(pattern)):
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


def test_open_run_succeeds_while_saves_come_and_go(make, corpus: Path):
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


def test_save_stall_is_in_the_metrics_and_the_summary(make, corpus: Path):
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
