"""Checkpoints: bit-equal at any world size and stage, complete or absent, verified before use."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.checkpoint import reader
from train.checkpoint.reader import Checkpoint, complete
from train.config import load as configuration

SAVE = ["steps=4", "save_every=2", "batch.global=12"]


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of 3 workers at stage 2 that made 4 steps."""
    folder = tmp_path_factory.mktemp("saved")
    config = composed(corpus, folder / "run", "zero=2", "cluster.workers=3")
    gloo_ranks.train_world(config, corpus)
    return config


def composed(corpus: Path, run: Path, *overrides: str):
    return gloo_ranks.on_corpus(corpus, run, *SAVE, *overrides)


def reload(world, emit, config, corpus: str) -> dict[str, torch.Tensor]:
    """Every piece that this rank holds after loading the newest checkpoint, and the whole weights."""
    from train.checkpoint.reader import find_newest
    from train.data.corpus.shards import Corpus
    from train.data.loader import loaders
    from train.run import build_engine, restore

    config = configuration.parse(config)
    corpus_ = Corpus(corpus)
    loader, _ = loaders(corpus_, config, world)
    engine, _ = build_engine(config, corpus_.tokenizer.vocab_size, world, loader)
    restore(find_newest(Path(config.run.dir or "") / "checkpoints", world, lambda text: None), engine, loader)
    loader.close()
    forward = gloo_ranks.whole_weights(engine)
    pieces = {}
    for shard in engine.param_shards:
        for kind, view in engine.states(shard).items():
            pieces[f"{kind}/{shard.name}@{shard.start}"] = view.clone().numpy()
    return {"pieces": pieces, "forward": {n: w.numpy() for n, w in forward.items()}}


@pytest.mark.parametrize(("workers", "zero"), [(1, "0"), (2, "1"), (2, "3"), (4, "2"), (1, "3_offload")])
def test_any_world_and_stage_loads_weights_and_moments_bit_for_bit(saved, corpus: Path, workers: int, zero: str):
    expected = gloo_ranks.state(saved, 4)
    config = composed(corpus, Path(saved.run.dir), f"cluster.workers={workers}", f"zero={zero}")
    ranks = gloo_ranks.run(workers, reload, configuration.to_dict(config), str(corpus))
    held = dict.fromkeys(expected, 0)
    for rank in ranks:
        for key, values in rank["pieces"].items():
            name, start = key.rsplit("@", 1)
            part = expected[name].flatten()[int(start) : int(start) + len(values)]
            assert torch.equal(torch.from_numpy(values), part)
            held[name] += len(values)
    assert all(n >= expected[name].numel() for name, n in held.items())
    for name, weight in ranks[0]["forward"].items():
        assert torch.equal(torch.from_numpy(weight), expected[f"weight/{name}"])


CORRUPTIONS = 200


def test_every_corruption_is_detected_and_the_one_before_is_used(saved, tmp_path: Path):
    """200 times one byte, file or name of the newer of two checkpoints of three ranks is damaged."""
    findings = gloo_ranks.run(1, corrupt_and_load, Path(saved.run.dir) / "checkpoints", tmp_path)[0]
    assert len(findings) == CORRUPTIONS
    assert {kind for kind, *_ in findings} == {"flip", "cut", "longer", "gone", "swap", "other step", "latest"}
    for kind, target, taken, notes in findings:
        if kind == "latest":  # it is for people; nothing is looked up by it
            assert taken == 4, (kind, target)
            assert any("latest says" in note for note in notes), (kind, target, notes)
        else:
            assert taken == 2, (kind, target, notes)
            assert any("step_4 is damaged and is not used: " in note for note in notes), (kind, target, notes)


def corrupt_and_load(world, emit, source: Path, scratch: Path):
    """(kind of corruption, its file, the step that was used, the notes) of every corruption."""
    from train.checkpoint.reader import find_newest

    draw, findings = random.Random(0), []
    for number in range(CORRUPTIONS):
        folder = scratch / str(number)
        shutil.copytree(source, folder)
        kind, target = corrupt(folder, draw)
        notes: list[str] = []
        checkpoint = find_newest(folder, world, notes.append)
        assert checkpoint.damage() is None
        findings.append((kind, target, checkpoint.progress.step, notes))
        shutil.rmtree(folder)
    return findings


def corrupt(folder: Path, draw: random.Random) -> tuple[str, str]:
    """Damage the newer checkpoint, or ``latest``, in one random way; returns the kind and the file."""
    files = sorted((folder / "step_4").iterdir())
    target = draw.choice(files)
    content = bytearray(target.read_bytes())
    kind = draw.choice(["flip"] * 6 + ["cut", "longer", "gone", "swap", "other step", "latest"])
    match kind:
        case "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            target.write_bytes(content)
        case "cut":
            target.write_bytes(content[: draw.randrange(len(content))])
        case "longer":
            target.write_bytes(content + draw.randbytes(draw.randint(1, 5000)))
        case "gone":
            target.unlink()
        case "swap":
            other = draw.choice([file for file in files if file != target])
            other_content = other.read_bytes()
            other.write_bytes(content)
            target.write_bytes(other_content)
        case "other step":
            shutil.copy(folder / "step_2" / target.name, target)
        case "latest":
            target = folder / "latest"
            name = bytearray(target.read_bytes())
            name[draw.randrange(len(name))] ^= 1 << draw.randrange(8)
            target.write_bytes(name)
    return kind, target.name


@pytest.mark.parametrize("moment", ["after its hash is taken", "between two openings"])
def test_checkpoint_dropped_while_it_is_verified_is_damaged(saved, tmp_path: Path, monkeypatch, moment: str):
    """A run may drop a checkpoint while others read it; safetensors and torch each open the file once."""
    source = complete(Path(saved.run.dir) / "checkpoints")[-1]
    checkpoint = Checkpoint(tmp_path / source.path.name, source.manifest)
    shutil.copytree(source.path, checkpoint.path)
    assert checkpoint.damage() is None
    sha256_of, from_file = reader.sha256_of, torch.UntypedStorage.from_file

    def hash_then_drop(file: Path) -> str:
        digest = sha256_of(file)
        checkpoint.path.rename(tmp_path / "dropped")
        return digest

    def drop_then_open(*arguments, **keywords):
        checkpoint.path.rename(tmp_path / "dropped")
        return from_file(*arguments, **keywords)

    if moment == "after its hash is taken":
        monkeypatch.setattr(reader, "sha256_of", hash_then_drop)
    else:
        monkeypatch.setattr(torch.UntypedStorage, "from_file", drop_then_open)
    assert checkpoint.damage() == "rank_0.safetensors cannot be read: No such file or directory"


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(make, corpus: Path):
    config = make("save_every=2", "steps=6", "cluster.workers=2")
    gloo_ranks.train_world(config, corpus, {"event": "step", "step": 4})
    whole = gloo_ranks.metrics(config)
    newest = complete(Path(config.run.dir) / "checkpoints")[-1]
    file = newest.path / "rank_1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    ranks = gloo_ranks.start(2, gloo_ranks.train, configuration.to_dict(config), str(corpus)).wait()
    assert [rank.result for rank in ranks] == ["done", "done"]
    notes = [e["text"] for e in ranks[0].events if e["event"] == "note"]
    assert any(f"{newest.path.name} is damaged" in text and "rank_1.safetensors" in text for text in notes)
    assert [line["step"] for line in gloo_ranks.metrics(config)] == [1, 2, 3, 4, 5, 6]
    assert gloo_ranks.metrics(config)[: len(whole)] == whole


def test_full_disk_ends_the_run_with_a_message_and_keeps_checkpoints(make, corpus: Path):
    config = make("save_every=2", "steps=6", "cluster.workers=2")
    ranks = gloo_ranks.run(2, train_with_little_room, configuration.to_dict(config), str(corpus))
    assert all("no checkpoint could be written" in text and "rank 1" in text for text in ranks)
    folder = Path(config.run.dir) / "checkpoints"
    assert [c.progress.step for c in complete(folder)] == [2]
    assert not list(folder.glob(".step_*"))
    assert gloo_ranks.train_world(config, corpus) == ["done", "done"]


def train_with_little_room(world, emit, config, corpus: str) -> str:
    """Rank 1 can write no large file once a checkpoint has been saved: like ENOSPC, EFBIG comes from write(2)."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def watch(event):
        if event["event"] == "save" and world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        emit(event)

    return gloo_ranks.train(world, watch, config, corpus)


def test_sigkill_during_a_save_leaves_a_whole_checkpoint_or_none(make, corpus: Path):
    """All ranks are killed at random instants of runs that save after every step; what remains is always whole."""
    draw = random.Random(1)
    whole = make("save_every=1", "steps=24", "cluster.workers=2", name="whole")
    parts = make("save_every=1", "steps=24", "cluster.workers=2", name="parts")
    gloo_ranks.train_world(whole, corpus)
    kills, end = 0, None
    while end != ["done", "done"]:
        running = gloo_ranks.start(2, gloo_ranks.train, configuration.to_dict(parts), str(corpus))
        if kills < 6:
            wait_for_step(running, draw.uniform(0.0, 0.3))
            running.kill()
            kills += 1
        ranks = running.wait()
        end = [rank.result for rank in ranks]
        for checkpoint in complete(Path(parts.run.dir) / "checkpoints"):
            assert checkpoint.damage() is None
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)
    expected, actual = gloo_ranks.state(whole, 24), gloo_ranks.state(parts, 24)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def wait_for_step(running: gloo_ranks.Running, seconds: float) -> None:
    """Wait until rank 0 has made a step, and ``seconds`` more."""
    import time

    pipe = running.pipes[0]
    while pipe.poll(30):
        kind, value = pipe.recv()
        if kind == "event" and value["event"] == "step":
            break
    time.sleep(seconds)


def test_newest_and_best_checkpoints_are_kept(make, corpus: Path):
    config = make("steps=10", "save_every=2", "eval_every=2", "keep_last=2", "keep_best=1", "optimizer.lr=1e-9")
    gloo_ranks.train_world(config, corpus)
    kept = complete(Path(config.run.dir) / "checkpoints")
    best = min((line["val_loss"], line["step"]) for line in gloo_ranks.metrics(config) if "val_loss" in line)[1]
    assert [c.progress.step for c in kept] == sorted({8, 10, best})
    assert json.loads((kept[-1].path / "checkpoint.json").read_text())["progress"]["step"] == 10
