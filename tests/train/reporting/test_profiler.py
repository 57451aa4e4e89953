"""The profiler of named steps, on real ranks: what a trace holds, and when there is none."""

import gzip
import json
from pathlib import Path
from typing import Any

from helpers import gloo_ranks

from train.config.schema import Config

PHASES = {"data", "forward 0", "backward 0", "step 0"}


def folder(config: Config) -> Path:
    return Path(config.run.dir or "") / "profile"


def named_ranges(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The ranges of a trace that the run has named, by name."""
    ranges: dict[str, list[dict[str, Any]]] = {}
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        if event.get("cat") == "user_annotation":
            ranges.setdefault(event["name"], []).append(event)
    return ranges


def test_trace_covers_the_steps_named_with_phases_on_the_ranks_named(make, corpus):
    config = make("cluster.workers=2", "batch.micro=1", "profile.steps=[3,5]", "profile.ranks=[1]")
    rank0, _ = gloo_ranks.start(2, gloo_ranks.train, gloo_ranks.configuration.to_dict(config), str(corpus)).wait()
    assert rank0.result == "done"
    assert [file.name for file in folder(config).iterdir()] == ["rank1_steps3-5.json.gz"]
    ranges = named_ranges(folder(config) / "rank1_steps3-5.json.gz")
    steps = [name for name in ranges if name.startswith("optimizer step")]
    assert steps == ["optimizer step 4", "optimizer step 5"]
    assert PHASES | {"forward 1", "backward 1", "step 1"} <= ranges.keys()
    assert len(ranges["forward 0"]) == len(ranges["backward 1"]) == len(ranges["step 1"]) == 2
    for name, phases in ranges.items():
        for phase in phases if name in PHASES else []:
            spans = [ranges[step][0] for step in steps]
            assert any(s["ts"] <= phase["ts"] and phase["ts"] + phase["dur"] <= s["ts"] + s["dur"] for s in spans), name
    [note] = [e["text"] for e in rank0.events if e["event"] == "note" and "profiled" in e["text"]]
    assert "steps 4 to 5" in note
    assert str(folder(config)) in note
    assert "perfetto" in note


def test_trace_with_memory_has_allocations(make, corpus):
    config = make("cluster.workers=1", "profile.steps=[0,1]", "profile.memory=true")
    assert gloo_ranks.train_world(config, corpus) == ["done"]
    events = json.loads(gzip.decompress((folder(config) / "rank0_steps0-1.json.gz").read_bytes()))["traceEvents"]
    sizes = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    assert max(sizes) > 0


def test_run_ended_by_an_early_kill_leaves_no_half_written_trace(make, corpus):
    config = make("cluster.workers=1", "profile.steps=[0,8]")
    running = gloo_ranks.start(1, gloo_ranks.train, gloo_ranks.configuration.to_dict(config), str(corpus))
    while running.pipes[0].poll(60):
        kind, event = running.pipes[0].recv()
        if kind == "event" and event["event"] == "step" and event["step"] >= 3:
            break
    running.kill()
    running.wait()
    assert not folder(config).exists()


def test_stop_within_the_steps_leaves_no_file_nor_does_a_resume(make, corpus):
    config = make("cluster.workers=2", "profile.steps=[2,6]", "profile.ranks=[0,1]")
    assert gloo_ranks.train_world(config, corpus, {"event": "step", "step": 4}) == ["stopped"] * 2
    assert not folder(config).exists()
    rank0, _ = gloo_ranks.start(2, gloo_ranks.train, gloo_ranks.configuration.to_dict(config), str(corpus)).wait()
    assert rank0.result == "done"
    assert not folder(config).exists()
    assert not any("profiled" in event.get("text", "") for event in rank0.events)
    plain = make("cluster.workers=2", name="plain")
    gloo_ranks.train_world(plain, corpus)
    assert gloo_ranks.metrics(config) == gloo_ranks.metrics(plain)
