"""The mirror: complete copies elsewhere, resume on a new machine, failures that never stop a step."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.checkpoint import manifest
from train.config import load as configuration

MIRRORED = ["cluster.workers=2", "save_every=2", "keep_last=2", "keep_best=0", "run.name=mine"]


def copies(elsewhere: Path) -> list[int]:
    """The steps of the complete copies, ascending."""
    return sorted(
        manifest.read(path.parent)["progress"]["step"] for path in elsewhere.glob("mine/step_*/checkpoint.json")
    )


def notes(ranks: list[gloo_ranks.Rank]) -> list[str]:
    return [event["text"] for event in ranks[0].events if event["event"] == "note"]


def train(config, corpus: Path, stop_when=None) -> list[gloo_ranks.Rank]:
    return gloo_ranks.start(
        config.cluster.workers, gloo_ranks.train, configuration.to_dict(config), str(corpus), stop_when
    ).wait()


def test_new_machine_resumes_from_the_mirror_bit_for_bit(make, corpus: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    whole = make(*MIRRORED, name="whole")
    config = make(*MIRRORED, f"save_mirror=file://{elsewhere}", name="parts")
    gloo_ranks.train_world(whole, corpus)
    assert [rank.result for rank in train(config, corpus, {"event": "step", "step": 5})] == ["stopped", "stopped"]
    stopped = copies(elsewhere)[-1]
    assert 5 <= stopped < 8
    before = json.loads((Path(config.run.dir) / "run.json").read_text())["wandb_id"]
    shutil.rmtree(config.run.dir)
    ranks = train(config, corpus)
    assert [rank.result for rank in ranks] == ["done", "done"]
    assert next(event["start_step"] for event in ranks[0].events if event["event"] == "plan") == stopped
    assert gloo_ranks.metrics(config) == gloo_ranks.metrics(whole)
    expected, actual = gloo_ranks.state(whole, 8), gloo_ranks.state(config, 8)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert json.loads((Path(config.run.dir) / "run.json").read_text())["wandb_id"] == before
    assert copies(elsewhere) == [stopped, 8] if stopped == 7 else [6, 8]
    other = make(*MIRRORED, f"save_mirror=file://{elsewhere}", "seed=1", name="other")
    assert all("holds a run of another kind" in rank.result for rank in train(other, corpus))


def test_damaged_copy_is_named_and_the_one_before_is_fetched(make, corpus: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    config = make(*MIRRORED, f"save_mirror=file://{elsewhere}")
    train(config, corpus)
    older, newer = copies(elsewhere)
    draw = random.Random(0)
    for name in ("rank_1.safetensors", manifest.MANIFEST):
        shutil.rmtree(config.run.dir)
        file = elsewhere / "mine" / f"step_{newer}" / name
        content = bytearray(good := file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        longer = make(*MIRRORED, f"save_mirror=file://{elsewhere}", "steps=9", "save_every=0")
        ranks = train(longer, corpus, {"event": "plan"})
        assert next(event["start_step"] for event in ranks[0].events if event["event"] == "plan") == older
        if name != manifest.MANIFEST:
            assert any("in the mirror is damaged and is not used: rank_1" in note for note in notes(ranks))
        file.write_bytes(good)


def test_failing_mirror_is_noted_but_stops_a_new_machine(make, corpus: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    config = make(*MIRRORED, "steps=20", f"save_mirror=file://{elsewhere}")
    elsewhere.write_text("in the way")
    ranks = train(config, corpus)  # a new run cannot know what the mirror has
    assert all("cannot be read" in rank.result for rank in ranks), ranks
    elsewhere.unlink()
    train(config, corpus, {"event": "step", "step": 3})
    shutil.rmtree(elsewhere)
    elsewhere.write_text("gone")
    ranks = train(config, corpus)
    assert [rank.result for rank in ranks] == ["done", "done"]
    assert len([note for note in notes(ranks) if "could not be copied" in note]) == 1
    assert gloo_ranks.metrics(config)[-1]["step"] == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file system of its own size")
def test_full_mirror_keeps_what_it_has(make, corpus: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(elsewhere)], check=True)
    try:
        config = make(
            *MIRRORED, "model.width=64", "keep_last=9", "save_every=1", "steps=12", f"save_mirror=file://{elsewhere}"
        )
        ranks = train(config, corpus)
        assert [rank.result for rank in ranks] == ["done", "done"]
        assert any("could not be copied" in note and "No space" in note for note in notes(ranks))
        copied = copies(elsewhere)
        assert copied
        shutil.rmtree(config.run.dir)
        ranks = train(config, corpus)
        assert next(event["start_step"] for event in ranks[0].events if event["event"] == "plan") == copied[-1]
    finally:
        subprocess.run(["umount", str(elsewhere)], check=True)


def test_sigkill_during_a_copy_leaves_whole_copies_or_none(make, corpus: Path, tmp_path: Path):
    elsewhere, draw = tmp_path / "elsewhere", random.Random(3)
    config = make(*MIRRORED, "save_every=1", "steps=60", f"save_mirror=file://{elsewhere}")
    reached = []
    for _ in range(3):
        running = gloo_ranks.start(2, gloo_ranks.train, configuration.to_dict(config), str(corpus))
        known = set(elsewhere.glob("mine/step_*"))
        while running.processes[0].is_alive() and set(elsewhere.glob("mine/step_*")) <= known:
            for pipe in running.pipes:
                while pipe.poll():
                    pipe.recv()
        gloo_ranks.time.sleep(draw.uniform(0, 0.1))
        running.kill()
        running.wait()
        shutil.rmtree(config.run.dir)  # the machine is lost with it
        ranks = gloo_ranks.start(
            2, gloo_ranks.train, {**configuration.to_dict(config), "steps": 1}, str(corpus), {"event": "plan"}
        ).wait()
        reached.append(next(event["start_step"] for event in ranks[0].events if event["event"] == "plan"))
        assert not [note for note in notes(ranks) if "damaged" in note]
    assert reached == sorted(reached)


def test_memory_file_system_can_be_a_mirror(make, corpus: Path):
    ends = gloo_ranks.run(
        1, lose_the_folder, configuration.to_dict(make("save_mirror=memory://there", "cluster.workers=1")), str(corpus)
    )
    assert ends == [("stopped", "done", 4)]


def lose_the_folder(world, emit, config, corpus: str) -> tuple[str, str, int]:
    events = []
    first = gloo_ranks.train(world, events.append, config, corpus, {"event": "step", "step": 3})
    shutil.rmtree(config["run"]["dir"])
    second = gloo_ranks.train(world, events.append, config, corpus)
    return first, second, [event["start_step"] for event in events if event["event"] == "plan"][-1]


@pytest.mark.parametrize(
    "url", ["sftp://me:canary@host/x", "pipe:ls", "simplecache::s3://x", "s3://b/x?key=canary", "/tmp/canary"]
)
def test_url_with_a_secret_or_no_plain_url_is_refused_and_not_shown(make, url: str):
    with pytest.raises(configuration.ConfigError) as caught:
        make(f'save_mirror="{url}"')
    assert "save_mirror is no plain URL" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_file_system_that_is_not_installed_is_refused(make, corpus: Path):
    ends = gloo_ranks.train_world(make("save_mirror=nowhere://x", "cluster.workers=1"), corpus)
    assert "save_mirror" in ends[0]
    assert "nowhere" in ends[0]


def test_rollback_deletes_copies_of_later_steps(make, corpus: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    words = *MIRRORED, "cluster.workers=1", f"save_mirror=file://{elsewhere}"
    config = make(*words)
    train(make(*words, "steps=6"), corpus)  # it ends when 6 is copied; a slow copy may skip earlier ones
    train(config, corpus)
    assert copies(elsewhere) == [6, 8]
    assert gloo_ranks.run(1, roll_back, configuration.to_dict(config), elsewhere) == [([6], [6, 8])]


def roll_back(world, emit, config, elsewhere: Path) -> tuple[list[int], list[int]]:
    """The copies after a rollback to step 6, and once the run has come to step 8 again."""
    from train.checkpoint.mirror import Mirror

    config = configuration.parse(config)
    mirror = Mirror(config.save_mirror, Path(config.run.dir), config, world, print)
    mirror.drop_after(6)
    first = copies(elsewhere)
    mirror.enqueue("step_8")
    mirror.wait_for_copies(60)
    return first, copies(elsewhere)
