"""Sweeps of real runs on real Ray: each trial equals the same run alone, within the room there is."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
from helpers import wandb_files
from helpers.chromium import NO_BROWSER, Browser

from cluster.driver.prepared_corpus import find_corpus
from cluster.host.stop_request import StopRequest
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.supervisor import Supervisor
from cluster.sweep.sweep_driver import exit_code
from review import __main__ as review
from review.run_differences import best_runs
from review.run_reader import read_runs
from train.config import load as configuration
from train.run_dir.compare import compare
from train.util.io import read_records

pytestmark = pytest.mark.timeout(900)  # on a loaded machine


def run_alone(config, resources):
    """Runs a configuration as a job of its own."""
    (configuration.Path(config.run.dir) / "logs").mkdir(parents=True)
    corpus = find_corpus(config, lambda event: None)
    job = Job(
        config,
        corpus,
        resources.target,
        resources.folder,
        lambda event: None,
        StopRequest(),
        StartupClock(time.time()),
        resources.local_cluster,
    )
    supervisor = Supervisor(job, "cpu")
    try:
        assert supervisor.run().kind == "done"
    finally:
        supervisor.release_slots()


def check_page(folder, out, runs):
    """Reviews a sweep, and checks its page where there is a browser."""
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


def most_workers(folder) -> int:
    """The most workers that had slots at any moment, by the ledger."""
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


def test_four_trials_of_two_workers_on_two_slots_equal_runs_alone(swept, resources, tmp_path):
    sweep = swept(
        *("model.layers=1,2", "optimizer.lr=1e-3,1e-2", "cluster.workers=2"),
        *("tracking=wandb", "tracking.wandb=offline", f"sweep.dir={tmp_path}/s", "sweep.name=two-by-two"),
    )
    assert sweep.states == ["done"] * 4
    assert sorted(path.name for path in sweep.folder.iterdir() if path.is_dir()) == ["000", "001", "002", "003"]
    assert most_workers(sweep.folder) == 2
    groups, ids = set(), set()
    for trial in sweep.trials:
        [file] = trial.folder.glob("wandb/offline-run-*/*.wandb")
        [about] = [record.run for record in wandb_files.records(file) if record.HasField("run")]
        groups.add(about.run_group)
        ids.add(about.run_id)
        keys = {item.key for item in about.config.update}
        assert {"optimizer", "lineage"} <= keys
        assert list(about.tags) == ["sweep"]
        other = trial.config.run.model_copy(update={"dir": str(tmp_path / f"alone{trial.number}")})
        run_alone(
            trial.config.model_copy(update={"run": other, "tracking": configuration.load(["tracking=off"]).tracking}),
            resources,
        )
        findings = compare(trial.folder, tmp_path / f"alone{trial.number}", 8)
        assert all(finding.compared and finding.difference is None for finding in findings), findings
    assert groups == {"two-by-two"}
    assert len(ids) == 4
    assert len({tuple(trial.values) for trial in sweep.trials}) == 4, "they differ from each other"


def test_trial_is_configured_as_the_same_overrides_alone(given, tmp_path):
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
    sweep = swept("seed=range(4)", "cluster.workers=1", "steps=20", f"sweep.dir={tmp_path}/s")
    assert sweep.states == ["done"] * 4
    assert most_workers(sweep.folder) == 2


def test_sweep_with_a_diverging_and_a_raising_trial_finishes_the_others(swept, resources, given, tmp_path):
    (tmp_path / "s" / "002" / "metrics.jsonl").mkdir(parents=True)
    words = [
        "optimizer.lr=1e-3,1e30,2e-3,3e-3",
        "cluster.workers=1",
        "optimizer.clip=0",
        "sweep.parallel=1",
        f"sweep.dir={tmp_path}/s",
    ]
    sweep = swept(*words)
    assert sweep.states == ["done", "diverged", "failed", "done"], sweep.said.getvalue()
    assert exit_code(sweep.scheduler) == 1
    ends = {r["trial"]: r for r in read_records(sweep.folder / "ledger.jsonl") if r["event"] == "end"}
    assert "optimizer.lr" in ends[1]["why"]
    assert "IsADirectoryError" in ends[2]["why"]
    said = sweep.said.getvalue()
    assert said.index("trial 1 (optimizer.lr=1e+30): diverged") < said.index("trial 2 (optimizer.lr=0.002): starts")
    assert said.index("IsADirectoryError: ") < said.index("trial 3 (optimizer.lr=0.003): starts")

    runs = read_runs([sweep.folder])
    assert [run.state for run in runs] == sweep.states
    assert "optimizer.lr" in runs[1].end_reason
    assert "IsADirectoryError" in runs[2].end_reason
    assert (
        best_runs(runs)[0].name
        == min((trial.values, run.name) for trial, run in zip(sweep.trials, runs, strict=True) if trial.values)[1]
    )
    check_page(sweep.folder, tmp_path / "review", runs)

    (tmp_path / "s" / "002" / "metrics.jsonl").rmdir()
    before = {n: (sweep.folder / f"{n:03}" / "summary.json").stat().st_mtime_ns for n in (0, 3)}
    again = swept(*words)
    assert again.states == ["done", "diverged", "done", "done"], "what failed is tried again, what diverged is not"
    assert before == {n: (sweep.folder / f"{n:03}" / "summary.json").stat().st_mtime_ns for n in (0, 3)}


def test_search_prunes_bad_trials_and_retries_killed_ones(swept, tmp_path):
    folder = tmp_path / "s"

    def kill() -> None:
        while not read_records(folder / "000" / "metrics.jsonl"):
            time.sleep(0.01)
        [rank] = json.loads((folder / "000" / "world.json").read_text())["ranks"]
        os.kill(rank["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    sweep = swept(
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
    said = sweep.said.getvalue()
    assert "will be tried again (sweep.retries=1)" in said
    ends = [(r["trial"], r["state"], r["step"]) for r in read_records(folder / "ledger.jsonl") if r["event"] == "end"]
    assert (ends[0][:2], len(ends)) == ((0, "failed"), 5)
    assert set(sweep.states) == {"done", "pruned"}, said
    for trial in sweep.trials:
        assert (trial.number, trial.state, trial.step) in ends
        if trial.state == "pruned":
            assert 25 <= trial.step < 200
            assert (trial.folder / "checkpoints" / f"step_{trial.step}").is_dir()
    sweep.scheduler.board.print_table()
    assert "│ pruned │" in sweep.said.getvalue()[len(said) :]
    assert exit_code(sweep.scheduler) == 0


def test_stopped_sweep_saves_running_trials_and_goes_on_when_restarted(swept, resources, given, tmp_path, monkeypatch):
    words = [
        "seed=range(3)",
        "cluster.workers=1",
        "steps=300",
        "save_every=10",
        "eval_every=0",
        f"sweep.dir={tmp_path}/s",
    ]
    stop = resources.signals.stop
    from cluster.sweep import scheduler

    class Stopping(scheduler.SweepScheduler):
        def _on_event(self, trial, job, event):
            super()._on_event(trial, job, event)
            if event["event"] == "save" and not stop.requested:
                stop.request(15)

    monkeypatch.setattr("cluster.sweep.sweep_driver.SweepScheduler", Stopping)
    sweep = swept(*words)
    assert sweep.scheduler.stopping
    assert set(sweep.states) <= {"stopped", "done", "queued"}
    assert "stopped" in sweep.states
    monkeypatch.undo()
    stop.signal = None
    again = swept(*words)
    assert again.states == ["done"] * 3
    assert "goes on from its checkpoint of step" in again.said.getvalue()
