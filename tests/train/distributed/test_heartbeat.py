"""The record that a rank keeps of what it does, read while it does it."""

import mmap
import os
import time

from helpers import gloo_ranks

from train.config import load as configuration
from train.distributed import heartbeat


def shared():
    """A record in memory, and the reader's view of it."""
    fd = os.memfd_create("pulse")
    os.ftruncate(fd, heartbeat.SIZE)
    record = heartbeat.HeartbeatWriter(mmap.mmap(-1, heartbeat.SIZE))
    record.attach(fd)
    return record, mmap.mmap(fd, heartbeat.SIZE)


def test_heartbeat_shows_phase_step_and_current_collective():
    record, memory = shared()
    record.set_step(12)
    record.enter_phase("backward", 3)
    seen = []

    @record.count_calls
    def all_gather():
        seen.append(heartbeat.read(memory))

    all_gather()
    inside, after = seen[0], heartbeat.read(memory)
    assert (inside["step"], inside["phase"], inside["micro"]) == (12, "backward", 3)
    assert (inside["collective"], inside["count"], inside["inside"]) == ("all_gather", 1, True)
    assert (after["collective"], after["count"], after["inside"]) == ("all_gather", 1, False)


def test_heartbeat_mark_resets_still_time_and_keeps_longest_phases():
    record, memory = shared()
    record.enter_phase("save")
    time.sleep(0.03)
    assert heartbeat.read(memory)["still_s"] >= 0.03
    record.enter_phase("data")
    assert heartbeat.read(memory)["still_s"] < 0.03
    assert heartbeat.read(memory)["longest_s"] == 0.0, "data was never ended"
    record.enter_phase("save")
    assert 0.03 <= heartbeat.read(memory)["longest_s"] < 1


def test_busy_time_excludes_waiting_in_collectives():
    record, memory = shared()
    wait = record.count_calls(time.sleep)
    record.enter_phase("forward")
    time.sleep(0.02)
    wait(0.2)
    record.enter_phase("eval")
    time.sleep(0.2)
    record.enter_phase("data")
    assert 0.02 <= heartbeat.read(memory)["busy_s"] < 0.1


def test_heartbeat_mark_costs_microseconds():
    record, _ = shared()
    began = time.perf_counter()
    for _ in range(10_000):
        record.enter_phase("forward")
    assert time.perf_counter() - began < 0.5, "50 us each: on a quiet machine it is a third of one"


def pulses(world, emit, config, corpus):
    """Train with the pulse in a file, looked at whenever a step is reported."""
    fd = os.memfd_create("pulse")
    os.ftruncate(fd, heartbeat.SIZE)
    memory, seen = mmap.mmap(fd, heartbeat.SIZE), []
    heartbeat.attach(fd)

    def watch(event):
        seen.append((event.to_json(), heartbeat.read(memory)))

    import deepspeed
    import torch

    from train.run import train_rank

    train_rank(configuration.parse(config), corpus, world, watch, lambda: False)
    last = heartbeat.read(memory)
    deepspeed.comm.all_reduce(torch.ones(1))
    return seen, last, heartbeat.read(memory)


def test_heartbeat_of_a_run_has_its_phases_and_deepspeed_collectives(make, corpus):
    config = make("steps=4", "zero=2", "cluster.workers=2", "generation.prompts=[ab]", "generation.max_tokens=3")
    for seen, last, theirs in gloo_ranks.run(2, pulses, configuration.to_dict(config), str(corpus)):
        steps = [(event["step"], beat["step"]) for event, beat in seen if event["event"] == "step"]
        assert steps
        assert all(reported == marked for reported, marked in steps)
        phases = {event["name"]: beat["phase"] for event, beat in seen if event["event"] == "phase"}
        assert phases["first_step"] == "start"
        assert phases["train"] in ("step", "save")
        assert last["phase"] == "end"
        counts = [beat["count"] for event, beat in seen if event["event"] == "step"]
        assert counts[-1] - counts[0] > 6, "more than our own two a step"
        assert (theirs["collective"], theirs["count"]) == ("all_reduce", last["count"] + 1), (
            "DeepSpeed's are counted too"
        )
        assert last["busy_s"] > 0
