"""The disturbed job of the benchmark of faults, on a command of our own with real processes and real signals."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from bench import faults

COUNTER = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
path = sys.argv[1]
time.sleep(0.2)
with open(path, "a+") as file:
    file.seek(0)
    step = len(file.readlines())
while child.poll() is None:
    step += 1
    with open(path, "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    time.sleep(0.01)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> faults.DisturbedJob:
    """Counts on where it stopped when it is given again; it ends with its child."""
    monkeypatch.setattr(faults, "WARM_UP_S", 0.0)
    monkeypatch.setattr(faults, "UNDISTURBED_S", 1.0)
    command = [sys.executable, "-c", COUNTER, str(tmp_path / "steps")]
    return faults.DisturbedJob(command, tmp_path / "log", lambda: faults.last_step(tmp_path / "steps"))


def test_a_job_that_nobody_kills_has_a_goodput_of_one(job: faults.DisturbedJob):
    course = faults.disturb(job, 0.03, 60.0, "workers", random.Random(0))
    assert not course.stalls
    assert course.commands == 1
    assert course.goodput == pytest.approx(1, abs=0.3)


def test_a_killed_command_is_given_again_and_its_pause_costs_goodput(job: faults.DisturbedJob):
    """Either death ends the command: its own, or its child's, which it waits for. Each start takes 0.2 s and more."""
    course = faults.disturb(job, 0.05, 0.5, "all", random.Random(0))
    kills = [pause for pauses in course.stalls.values() for pause in pauses]
    assert len(kills) >= 5
    assert course.commands >= len(kills)
    assert 0 < course.goodput < 0.98
    assert min(kills[:-1]) > 0.1


def test_a_step_is_read_from_the_last_whole_line(tmp_path: Path):
    file = tmp_path / "steps"
    assert faults.last_step(file) == 0
    file.write_text('{"step": 7}\n{"step": 8}\n{"st', encoding="utf-8")
    assert faults.last_step(file) == 8
