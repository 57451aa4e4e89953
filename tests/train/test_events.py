"""The JSON of events: its keys are a contract with all readers of events."""

import json
from dataclasses import fields

import pytest

from train import events

EXAMPLES = [
    (events.PhaseEvent("train", 1.5), {"event": "phase", "name": "train", "t": 1.5}),
    (events.PhaseEvent("ray"), {"event": "phase", "name": "ray"}),
    (
        events.StepEvent(1000, 10, {"loss": 6.5, "lr": 1e-3}),
        {"event": "step", "steps": 1000, "step": 10, "loss": 6.5, "lr": 1e-3},
    ),
    (
        events.EvalEvent(200, 0.5, {"val_loss": 3.5}),
        {"event": "eval", "step": 200, "seconds": 0.5, "val_loss": 3.5},
    ),
    (
        events.SaveEvent(4, "x/step_4", 0.25, 0.0),
        {"event": "save", "step": 4, "path": "x/step_4", "seconds": 0.25, "stall_s": 0.0},
    ),
    (events.SampleEvent(4, "def ", "x"), {"event": "sample", "step": 4, "prompt": "def ", "text": "x"}),
    (events.NoteEvent("W&B is offline"), {"event": "note", "text": "W&B is offline"}),
    (events.DoneEvent({"step": 4}), {"event": "done", "summary": {"step": 4}}),
    (events.StopAskedEvent(15), {"event": "stop_asked", "signal": 15}),
    (events.StopAgreedEvent(), {"event": "stop_agreed"}),
    (events.ErrorEvent("user", "no"), {"event": "error", "kind": "user", "text": "no"}),
    (
        events.ExitEvent(0, 7, 1.0, 1, 2, at={"step": 3}),
        {"event": "exit", "code": 0, "pid": 7, "t": 1.0, "rank": 1, "generation": 2, "at": {"step": 3}},
    ),
    (events.JobEvent({"steps": 4}, "cpu", 2), {"event": "job", "config": {"steps": 4}, "device": "cpu", "hosts": 2}),
    (
        events.PrepareEvent("read", {"phase": "read", "done": 1, "total": 2}),
        {"event": "prepare", "phase": "read", "done": 1, "total": 2},
    ),
    (events.StartedEvent([7, 8], 0), {"event": "started", "pids": [7, 8], "generation": 0}),
    (
        events.WorldEvent(0, 2, {"train": 1.0}),
        {"event": "world", "generation": 0, "size": 2, "marks": {"train": 1.0}},
    ),
    (events.StoppingEvent(15), {"event": "stopping", "signal": 15}),
    (
        events.FailureEvent(["rank 1 died"], None, again=False),
        {"event": "failure", "lines": ["rank 1 died"], "next": None, "again": False},
    ),
    (
        events.RecoveredEvent(1, 2, {"train": 1.0, "failed": 0.5}),
        {"event": "recovered", "generation": 1, "workers": 2, "train": 1.0, "failed": 0.5},
    ),
    (
        events.SweepBegunRecord({"fixed": {}, "axes": {}, "sweep": {}}, None),
        {"event": "sweep", "fixed": {}, "axes": {}, "sweep": {}, "grid": None},
    ),
    (
        events.TrialAddedRecord(7, {"lr": "1"}, {}),
        {"event": "trial", "trial": 7, "params": {"lr": "1"}, "attrs": {}},
    ),
    (
        events.TrialStartedRecord(7, 2, ["oar"]),
        {"event": "start", "trial": 7, "workers": 2, "hosts": ["oar"]},
    ),
    (
        events.TrialEndedRecord(7, "done", 8, [2.5], ""),
        {"event": "end", "trial": 7, "state": "done", "step": 8, "values": [2.5], "why": ""},
    ),
]


@pytest.mark.parametrize(("event", "record"), EXAMPLES, ids=lambda value: getattr(value, "event", ""))
def test_json_of_an_event_has_exactly_these_keys_in_this_order(event, record):
    assert json.dumps(event.to_json()) == json.dumps(record)


@pytest.mark.parametrize("event", [event for event, _ in EXAMPLES], ids=lambda event: event.event)
def test_event_read_back_from_its_json_has_the_same_json(event):
    assert events.from_json(json.loads(json.dumps(event.to_json()))).to_json() == event.to_json()


def test_keys_that_an_agent_adds_are_no_metrics():
    record = {"t": 1.0, "event": "step", "steps": 9, "step": 1, "loss": 2.0, "rank": 0, "generation": 3}
    assert events.from_json(record) == events.StepEvent(9, 1, {"loss": 2.0})


def test_unknown_kind_and_record_without_required_keys_give_no_event():
    assert events.from_json({"event": "unheard of"}) is None
    assert events.from_json({}) is None
    assert events.from_json({"event": "started"}) is None


def test_every_kind_is_named_once_and_its_fields_spare_the_key_event():
    assert {kind.event for kind in events.KINDS.values()} == events.KINDS.keys()
    for kind in events.KINDS.values():
        assert "event" not in [field.name for field in fields(kind)]
