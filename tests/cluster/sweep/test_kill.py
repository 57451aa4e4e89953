"""A sweep's driver killed in the middle of a trial: the same command goes on as if unbroken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from helpers import gloo_ranks

from train.run_dir.compare import compare
from train.util.io import read_records

STEPS = "steps=8,9,250,7,10,6"
"""The third trial takes long enough to be killed in its middle."""


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def start_sweep(words, out):
    environment = {**os.environ, "PYTHONPATH": str(gloo_ranks.REPOSITORY), "TRIREME_T0": str(time.time())}
    command = [sys.executable, "-m", "cluster", "train", "-m", *words]
    with out.open("w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )


def wait_for_steps(run, process, out):
    """Waits until a run has made 30 steps."""
    deadline = time.monotonic() + 200
    while len(read_records(run / "metrics.jsonl")) < 30:
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.01)


@pytest.mark.timeout(900)  # on a loaded machine
def test_sweep_killed_in_its_third_trial_of_six_goes_on_there(private, swept, given, tmp_path):
    given = [*given, f"cluster.address={private.node.address}"]
    words = [STEPS, "cluster.workers=2", "eval_every=0", "save_every=10", "keep_last=100", "sweep.name=six"]
    folder, out = tmp_path / "killed", tmp_path / "out"
    process = start_sweep([*given, *words, f"sweep.dir={folder}"], out)
    third = folder / "002"
    try:
        wait_for_steps(third, process, out)
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + 60
    while any(opens_below(third, process) for process in psutil.process_iter()):
        assert time.monotonic() < end, "workers of a killed driver live on"
        time.sleep(0.1)
    assert not (third / "summary.json").exists()
    before = contents(folder / "000"), contents(folder / "001")
    again = tmp_path / "again"
    process = start_sweep([*given, *words, f"sweep.dir={folder}"], again)
    assert process.wait(250) == 0, again.read_text()
    assert (contents(folder / "000"), contents(folder / "001")) == before
    assert "trial 2 (steps=250): goes on from its checkpoint of step" in again.read_text()
    assert "2 are done already" in again.read_text()
    assert json.loads((third / "run.json").read_text())["starts"] == 2
    assert [r["step"] for r in read_records(third / "metrics.jsonl")] == list(range(1, 251))

    undisturbed = swept(*words, f"sweep.dir={tmp_path}/whole")
    assert (folder / "results.csv").read_text() == (undisturbed.folder / "results.csv").read_text()
    assert all(finding.difference is None for finding in compare(third, undisturbed.folder / "002", 250))


@pytest.mark.timeout(900)  # on a loaded machine
def test_killed_sweep_ends_its_cluster_and_a_killed_raylet_is_replaced(given, tmp_path):
    words = ["seed=0,1", "steps=250", "save_every=10", "eval_every=0", "cluster.workers=1", "sweep.parallel=1"]
    folder, out, again = tmp_path / "own", tmp_path / "out", tmp_path / "again"
    process = start_sweep([*given, *words, f"sweep.dir={folder}"], out)
    try:
        wait_for_steps(folder / "000", process, out)
        ours = psutil.Process(process.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {p.name() for p in ours}
    finally:
        process.kill()
        process.wait()
    assert psutil.wait_procs(ours, 60)[1] == []

    process = start_sweep([*given, *words, f"sweep.dir={folder}"], again)
    try:
        wait_for_steps(folder / "001", process, again)
        [raylet] = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "raylet"]
        raylet.kill()
        assert process.wait(250) == 0, again.read_text()
    finally:
        process.kill()
    said = again.read_text()
    assert "trial 0 (seed=0): goes on from its checkpoint of step" in said
    assert said.index("starting them anew") < said.index("trial 1 (seed=1): goes on from its checkpoint of step")
    for run in ("000", "001"):
        assert [r["step"] for r in read_records(folder / run / "metrics.jsonl")] == list(range(1, 251))


def opens_below(folder, process):
    try:
        return any(str(folder) in file.path for file in process.open_files())
    except psutil.Error:
        return False
