"""One phase of a run is marked for all who follow it: heartbeat, events and the cause of its seconds."""

import mmap
import os

import pytest

from train import events
from train.distributed import heartbeat
from train.reporting.activity import PHASES, RankActivity
from train.reporting.goodput import CAUSES


@pytest.fixture
def memory():
    """The heartbeat's memory, as another process sees it."""
    fd = os.memfd_create("heartbeat")
    os.ftruncate(fd, heartbeat.SIZE)
    heartbeat.attach(fd)
    shared = mmap.mmap(fd, heartbeat.SIZE)
    os.close(fd)
    return shared


def test_phase_table_uses_known_heartbeats_and_causes_only():
    for marks in PHASES.values():
        assert marks.heartbeat in (None, *heartbeat.PHASES)
        assert marks.cause in (None, *CAUSES)


def test_phase_marks_heartbeat_and_event_first_and_seconds_at_the_end(memory):
    emitted = []
    activity = RankActivity(lambda event: emitted.append((event.name, heartbeat.read(memory)["phase"])))
    activity.begin_step(3)
    with activity.phase("evaluate"):
        assert emitted == [("eval", "eval")]
        assert activity.times.spent["eval"] == 0.0
        activity.enter("sample")
    assert emitted == [("eval", "eval"), ("train", "sample")]
    assert activity.times.spent["eval"] > 0.0
    assert heartbeat.read(memory)["step"] == 3


def test_phase_left_by_an_exception_charges_no_seconds():
    emitted = []
    activity = RankActivity(emitted.append)
    with pytest.raises(KeyError), activity.phase("evaluate"):
        raise KeyError
    assert [event.to_json()["name"] for event in emitted] == ["eval"]
    assert all(isinstance(event, events.PhaseEvent) for event in emitted)
    assert sum(activity.times.spent.values()) == 0.0
    activity.charge("save")
    assert activity.times.spent["save"] > 0.0
