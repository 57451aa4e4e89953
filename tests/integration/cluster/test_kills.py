"""Jobs whose processes are killed at random moments, all of them or any one, as a user meets it: nothing is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration

REPOSITORY = Path(__file__).resolve().parents[3]
STEPS = 60
KILLS = 5


def processes_of(mark):
    """Every living process that inherited ``mark`` in its environment."""
    living = []
    for process in psutil.process_iter():
        try:
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace").split("\0"):
                living.append(process)
        except OSError:
            continue
    return living


def run(overrides, folder, mark, kill_when=None, seconds=240):
    """Runs the command, and SIGKILLs it with all its processes once ``kill_when()`` holds: exit code and output."""
    name, _, value = mark.partition("=")
    out = folder / "out"
    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "train", *overrides],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", name: value},
            stdout=file,
            stderr=file,
            cwd=folder,
        )
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, out.read_text()
        if kill_when is not None and kill_when():
            for victim in processes_of(mark):
                victim.suspend()  # so that nobody sees another die: the machine is gone at once
            for victim in processes_of(mark):
                victim.kill()
            process.wait()
        time.sleep(0.005)
    return process.returncode, out.read_text()


@pytest.mark.slow
def test_run_killed_at_random_moments_equals_an_unbroken_run(as_typed, tmp_path):
    draw = random.Random(os.environ.get("TRIREME_KILL_SEED", "7"))
    settings = [f"steps={STEPS}", "save_every=3", "eval_every=15", "keep_last=2", "cluster.workers=2", "zero=2"]
    undisturbed, config = (configuration.load(as_typed(*settings, name=name)) for name in ("whole", "killed"))
    mark = f"TRIREME_KILLS={tmp_path}"
    code, text = run(as_typed(*settings, name="whole"), tmp_path, mark)
    assert code == 0, text

    overrides = as_typed(*settings, name="killed")
    folder = Path(config.run.dir) / "checkpoints"
    for number in range(KILLS):
        saving = number % 2 == 1
        reached = (number + 1) * STEPS // (KILLS + 2) + draw.randint(0, 4)
        delay, since = draw.uniform(0, 0.03 if saving else 0.3), []

        def now(saving=saving, reached=reached, delay=delay, since=since):
            """Past a step, and, every other time, while a checkpoint is being written; then a random moment later."""
            done = [int(m[1]) for p in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
            if not since and max(done, default=0) >= reached and (not saving or any(folder.glob(".step_*.saving"))):
                since.append(time.monotonic())
            return bool(since) and time.monotonic() >= since[0] + delay

        code, text = run(overrides, tmp_path, mark, now)
        assert code == -signal.SIGKILL, text
    code, text = run(overrides, tmp_path, mark)
    assert code == 0, text
    assert "resumes" in text
    assert gloo_ranks.metrics(config) == gloo_ranks.metrics(undisturbed)
    ours, theirs = gloo_ranks.state(config, STEPS), gloo_ranks.state(undisturbed, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(folder.glob(".step_*")), "what a kill left aside is removed"


LONG, SINGLE_KILLS = 300, 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_whose_processes_die_one_by_one_equals_an_unbroken_run(as_typed, tmp_path):
    """Kills workers, agents, the fork server, processes of Ray and the driver, whose command is then given again."""
    draw = random.Random(os.environ.get("TRIREME_KILL_SEED", "11"))
    settings = [f"steps={LONG}", "save_every=5", "eval_every=50", "keep_last=2", "cluster.workers=2", "zero=2"]
    undisturbed, config = (configuration.load(as_typed(*settings, name=name)) for name in ("whole", "killed"))
    mark = f"TRIREME_SINGLE_KILLS={tmp_path}"
    code, text = run(as_typed(*settings, name="whole"), tmp_path, mark)
    assert code == 0, text

    metrics, hit = Path(config.run.dir) / "metrics.jsonl", []
    points = sorted(draw.sample(range(2, LONG - 10), SINGLE_KILLS))

    def strike():
        """Once the next point is passed, and some random moment later, SIGKILL any one process of the job."""
        if len(hit) < SINGLE_KILLS and reached(metrics) >= points[len(hit)] and (living := processes_of(mark)):
            time.sleep(draw.uniform(0, 0.2))
            victim = draw.choice(living)
            try:
                name = victim.name()
                victim.kill()
                hit.append(name)
            except psutil.NoSuchProcess:
                pass
        return False

    starts = 0
    while code != 0 or not starts:
        code, text = run(as_typed(*settings, name="killed"), tmp_path, mark, strike, seconds=1500)
        starts += 1
        assert starts <= SINGLE_KILLS + 1, text
    print(f"{starts} commands; killed: {hit}")
    assert len(hit) == SINGLE_KILLS
    assert gloo_ranks.metrics(config) == gloo_ranks.metrics(undisturbed), "the data_hash and the loss of every step"
    ours, theirs = gloo_ranks.state(config, LONG), gloo_ranks.state(undisturbed, LONG)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def reached(metrics):
    """The last step whose whole line is in the metrics; 0 without one."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0
