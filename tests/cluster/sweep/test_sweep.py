"""Sweeps of real runs, placed by real Ray: each trial is the run that it would be alone, and no more run than there is room for."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
from helpers import wandb_files
from helpers.chromium import NO_BROWSER, Browser

from cluster.host.stop_request import StopRequest
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.supervisor import Supervisor
from cluster.sweep.cli import verdict
from review import __main__ as review
from review.run_differences import best_runs
from review.run_reader import read_runs
from train.config import load as configuration
from train.run_dir.compare import compare
from train.util.io import read_records

pytestmark = pytest.mark.timeout(900)  # on a loaded machine


def alone(config, ground):
    """The run of a configuration, started as a job of its own."""
    (configuration.Path(config.run.dir) / "logs").mkdir(parents=True)
    corpus = ground.find_corpus(config, lambda event: None)
    job = Job(
        config,
        corpus,
        ground.target,
        ground.folder,
        lambda event: None,
        StopRequest(),
        StartupClock(time.time()),
        ground.private,
    )
    supervisor = Supervisor(job, "cpu")
    try:
        assert supervisor.run().kind == "done"
    finally:
        supervisor.release_slots()


def look_at_page(folder, out, runs):
    """Reviews a sweep, and opens the page where there is a browser."""
    assert review.main([str(folder), "--out", str(out), "--format", "html"]) == 0
    if not NO_BROWSER:
        with Browser() as browser:
            browser.open(out / "review.html")
            cells = browser.value(
                "[...document.querySelectorAll('#table tbody tr')].map(row => row.children[1].textContent)"
            )
            assert sorted(cells) == sorted(run.state for run in runs)
            assert "IsADirectoryError" in browser.value("document.getElementById('failures').textContent")
            assert browser.value("document.getElementById('search').data.slice(1).flatMap(t => t.x).length") == len(
                runs
            )
            assert browser.messages == []


def at_once(folder) -> int:
    """The most workers that had places at any moment, by the ledger."""
    records = read_records(folder / "ledger.jsonl")
    workers = {r["trial"]: r["workers"] for r in records if r["event"] == "start"}
    changes = [
        (r["t"], workers[r["trial"]] * (1 if r["event"] == "start" else -1))
        for r in records
        if r["event"] in ("start", "end")
    ]
    sums, now = [], 0
    for _, change in sorted(changes):
        now += change
        sums.append(now)
    return max(sums)


def test_four_trials_of_two_workers_on_two_slots_are_the_runs_that_they_are_alone(swept, ground, tmp_path):
    found = swept(
        *("model.layers=1,2", "optimizer.lr=1e-3,1e-2", "cluster.workers=2"),
        *("tracking=wandb", "tracking.wandb=offline", f"sweep.dir={tmp_path}/s", "sweep.name=two-by-two"),
    )
    assert found.states == ["done"] * 4
    assert sorted(path.name for path in found.folder.iterdir() if path.is_dir()) == ["000", "001", "002", "003"]
    assert at_once(found.folder) == 2
    groups, ids = set(), set()
    for trial in found.trials:
        [file] = trial.folder.glob("wandb/offline-run-*/*.wandb")
        [about] = [record.run for record in wandb_files.records(file) if record.HasField("run")]
        groups.add(about.run_group)
        ids.add(about.run_id)
        keys = {item.key for item in about.config.update}
        assert {"optimizer", "lineage"} <= keys
        assert list(about.tags) == ["sweep"]
        other = trial.config.run.model_copy(update={"dir": str(tmp_path / f"alone{trial.number}")})
        alone(
            trial.config.model_copy(update={"run": other, "tracking": configuration.load(["tracking=off"]).tracking}),
            ground,
        )
        findings = compare(trial.folder, tmp_path / f"alone{trial.number}", 8)
        assert all(finding.compared and finding.difference is None for finding in findings), findings
    assert groups == {"two-by-two"}
    assert len(ids) == 4
    assert len({tuple(trial.values) for trial in found.trials}) == 4, "they differ from each other"


def test_a_trial_is_configured_as_the_same_words_alone_would_be(given, tmp_path):
    sweep = configuration.load_sweep(
        [*given, "optimizer.lr=1e-3,1e-2", "zero=0,2", f"sweep.dir={tmp_path}", "sweep.name=s"]
    )
    trial = configuration.load_trial(sweep, 3, {"optimizer.lr": "1e-2", "zero": "2"})
    typed = [
        f"run.dir={tmp_path}/003",
        "run.name=s-003",
        "tracking.group=s",
        "tracking.tags=[sweep]",
        "optimizer.lr=1e-2",
        "zero=2",
    ]
    assert trial == configuration.load([*given, *typed])


def test_trials_of_one_worker_run_two_at_once_on_two_slots(swept, tmp_path):
    found = swept("seed=range(4)", "cluster.workers=1", "steps=20", f"sweep.dir={tmp_path}/s")
    assert found.states == ["done"] * 4
    assert at_once(found.folder) == 2


def test_one_trial_diverges_and_one_raises_and_the_others_finish(swept, ground, given, tmp_path):
    (tmp_path / "s" / "002" / "metrics.jsonl").mkdir(parents=True)
    words = [
        "optimizer.lr=1e-3,1e30,2e-3,3e-3",
        "cluster.workers=1",
        "optimizer.clip=0",
        "sweep.parallel=1",
        f"sweep.dir={tmp_path}/s",
    ]
    found = swept(*words)
    assert found.states == ["done", "diverged", "failed", "done"], found.said.getvalue()
    assert verdict(found.queue) == 1
    ends = {r["trial"]: r for r in read_records(found.folder / "ledger.jsonl") if r["event"] == "end"}
    assert "optimizer.lr" in ends[1]["why"]
    assert "IsADirectoryError" in ends[2]["why"]
    said = found.said.getvalue()
    assert said.index("trial 1 (optimizer.lr=1e+30): diverged") < said.index("trial 2 (optimizer.lr=0.002): starts")
    assert said.index("IsADirectoryError: ") < said.index("trial 3 (optimizer.lr=0.003): starts")

    runs = read_runs([found.folder])
    assert [run.state for run in runs] == found.states
    assert "optimizer.lr" in runs[1].end_reason
    assert "IsADirectoryError" in runs[2].end_reason
    assert (
        best_runs(runs)[0].name
        == min((trial.values, run.name) for trial, run in zip(found.trials, runs, strict=True) if trial.values)[1]
    )
    look_at_page(found.folder, tmp_path / "review", runs)

    (tmp_path / "s" / "002" / "metrics.jsonl").rmdir()
    before = {n: (found.folder / f"{n:03}" / "summary.json").stat().st_mtime_ns for n in (0, 3)}
    again = swept(*words)
    assert again.states == ["done", "diverged", "done", "done"], "what failed is tried again, what diverged is not"
    assert before == {n: (found.folder / f"{n:03}" / "summary.json").stat().st_mtime_ns for n in (0, 3)}


def test_a_search_ends_what_is_no_good_and_tries_again_what_was_killed(swept, tmp_path):
    folder = tmp_path / "s"

    def kill() -> None:
        while not read_records(folder / "000" / "metrics.jsonl"):
            time.sleep(0.01)
        [rank] = json.loads((folder / "000" / "world.json").read_text())["ranks"]
        os.kill(rank["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = swept(
        *(
            "optimizer.lr=tag(log,interval(1e-6,1e-2))",
            "sweep=random",
            "sweep.trials=4",
            "sweep.pruner=asha",
            "sweep.parallel=1",
        ),
        *("steps=200", "eval_every=25", "save_every=50", "cluster.workers=1", f"sweep.dir={folder}"),
    )
    thread.join()
    said = found.said.getvalue()
    assert "will be tried again (sweep.retries=1)" in said
    ends = [(r["trial"], r["state"], r["step"]) for r in read_records(folder / "ledger.jsonl") if r["event"] == "end"]
    assert (ends[0][:2], len(ends)) == ((0, "failed"), 5)
    assert set(found.states) == {"done", "pruned"}, said
    for trial in found.trials:
        assert (trial.number, trial.state, trial.step) in ends
        if trial.state == "pruned":
            assert 25 <= trial.step < 200
            assert (trial.folder / "checkpoints" / f"step_{trial.step}").is_dir()
    found.queue.board.final()
    assert "│ pruned │" in found.said.getvalue()[len(said) :]
    assert verdict(found.queue) == 0


def test_a_stop_saves_all_that_runs_and_the_next_start_goes_on(swept, ground, given, tmp_path, monkeypatch):
    words = [
        "seed=range(3)",
        "cluster.workers=1",
        "steps=300",
        "save_every=10",
        "eval_every=0",
        f"sweep.dir={tmp_path}/s",
    ]
    stop = ground.signals.stop
    from cluster.sweep import scheduler

    class Stopping(scheduler.SweepScheduler):
        def _tell(self, trial, running, event):
            super()._tell(trial, running, event)
            if event["event"] == "save" and not stop.requested:
                stop.request(15)

    monkeypatch.setattr("cluster.sweep.cli.SweepScheduler", Stopping)
    found = swept(*words)
    assert found.queue.stopping
    assert set(found.states) <= {"stopped", "done", "queued"}
    assert "stopped" in found.states
    monkeypatch.undo()
    stop.signal = None
    again = swept(*words)
    assert again.states == ["done"] * 3
    assert "goes on from its checkpoint of step" in again.said.getvalue()
