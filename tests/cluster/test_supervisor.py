"""Worlds of real trainers, forked by real stewards on a real private Ray cluster that the cases share."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster import host, nodes
from cluster.job import Clock, Job
from cluster.signals import Signals
from cluster.supervisor import Supervisor
from train import config as configuration
from train.errors import UserError

HERE = Path(__file__).resolve().parent
TARGET = "toy:train_rank"


@pytest.fixture(scope="module")
def job_folder():
    """A private cluster of two cores, and the folder with the warm process of its host."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = f"{HERE.parents[1]}:{HERE}"
    folder = host.make_folder()
    warm = host.WarmProcess(folder, TARGET)
    warm.set_device("cpu")
    node = nodes.start_private(2, 0, folder)
    yield folder
    nodes.shutdown(node)
    warm.close()
    os.environ.clear()
    os.environ.update(before)


class Run:
    """A job on the shared cluster: what it showed and how it ended."""

    def __init__(self, folder, tmp_path, fault=None, steps=5, **cluster):
        base = configuration.to_dict(configuration.load([f"run.dir={tmp_path}/run", "schedule.warmup=0"]))
        values = {**base, "steps": steps, "cluster": {**base["cluster"], **cluster}}
        (tmp_path / "run" / "logs").mkdir(parents=True)
        self.events = []
        self.signals = Signals()
        config = configuration.parse(values)
        job = Job(config, json.dumps(fault or {}), TARGET, folder.name, self.events.append, self.signals, Clock(time.time()))
        self.clock = job.clock
        self.supervisor = Supervisor(job, "cpu")

    def go(self):
        try:
            return self.supervisor.run()
        finally:
            self.supervisor.release()

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]

    def pids(self):
        return self.of("started")[-1]["pids"]


def when(condition, seconds=30):
    """Waits for ``condition`` in this thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def meanwhile(action):
    """Does ``action`` in another thread; pytest reports what it raises."""
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_a_world_runs_to_its_end_and_its_start_is_timed_by_phase(job_folder, tmp_path):
    run = Run(job_folder, tmp_path)
    assert run.go().kind == "done"
    assert [event["step"] for event in run.of("step")] == [1, 2, 3, 4, 5]
    assert run.of("done")[0]["summary"] == {"step": 5}
    marks = run.clock.marks
    assert marks["workers"] <= marks["start"] <= marks["connected"] <= marks["engine"] <= marks["first_step"] <= marks["train"]
    when(lambda: not any(psutil.pid_exists(pid) for pid in run.pids()), 5)


def test_a_killed_rank_is_named_first_and_the_others_are_folded(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"rank": 1, "step": 3, "do": "kill"})
    began = time.monotonic()
    assert run.go().kind == "failed"
    assert time.monotonic() - began < 10
    [failure] = run.of("failure")
    assert failure["lines"][0] == f"rank 1 on {socket.gethostname()} (pid {run.pids()[1]}) killed by SIGKILL"
    assert "  rank 1 is about to kill" in failure["lines"]
    assert failure["lines"][-1].startswith("rank 0 fell with it")
    assert failure["next"] is None


def test_a_raising_rank_shows_its_traceback_first(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"rank": 1, "step": 2, "do": "raise"})
    assert run.go().kind == "failed"
    lines = run.of("failure")[0]["lines"]
    assert "rank 1" in lines[0]
    assert "raised ValueError" in lines[0]
    assert "ValueError: the oar broke" in lines
    assert lines[-1].startswith("rank 0 fell with it")


def test_bad_input_found_by_every_rank_is_one_message(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"rank": "all", "step": 1, "do": "refuse"}, max_failures=3)
    verdict = run.go()
    assert verdict.kind == "bad_input"
    assert verdict.cause.error == "the corpus is not the one that this run began with"
    assert not run.of("failure")


def test_a_failed_world_starts_again_and_goes_on_where_it_was(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"rank": 1, "step": 3, "do": "kill", "times": 2}, max_failures=2)
    assert run.go().kind == "done"
    assert [event["start_step"] for event in run.of("plan")] == [0, 2, 2]
    assert [event["step"] for event in run.of("step")] == [1, 2, 3, 4, 5]
    assert [failure["next"] for failure in run.of("failure")] == [
        "starting again from the newest checkpoint (restart 1 of 2)",
        "starting again from the newest checkpoint (restart 2 of 2)",
    ]


def test_no_more_restarts_than_allowed(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"rank": 0, "step": 2, "do": "exit"}, max_failures=1)
    assert run.go().kind == "failed"
    assert [failure["next"] is None for failure in run.of("failure")] == [False, True]
    assert "exited with code 7 without a word" in run.of("failure")[0]["lines"][0]


def test_a_sigterm_to_one_trainer_stops_the_job_after_saving(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"sleep": 0.05}, steps=1000)

    def terminate():
        when(lambda: len(run.of("step")) > 2)
        os.kill(run.pids()[1], signal.SIGTERM)

    other = meanwhile(terminate)
    assert run.go().kind == "stopped"
    other.join()
    assert run.of("stopping")


def test_a_dead_steward_is_replaced_for_the_next_start(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"sleep": 0.05}, steps=60, max_failures=1)

    def kill_steward():
        when(lambda: len(run.of("step")) > 2)
        os.kill(run.supervisor.places[1]["pid"], signal.SIGKILL)

    other = meanwhile(kill_steward)
    assert run.go().kind == "done"
    other.join()
    assert "rank 1" in run.of("failure")[0]["lines"][0]
    assert "lost with its steward" in run.of("failure")[0]["lines"][0]


def test_a_taken_port_is_named_with_the_cure(job_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cluster.port={port} .*in use.*[\s\S]*cluster.port=0"):
            Run(job_folder, tmp_path, port=port).go()


def test_nothing_of_a_private_cluster_listens_off_the_loopback(job_folder):
    ours = {p.pid for p in psutil.Process().children(recursive=True)} | {os.getpid()}
    listening = [c for c in psutil.net_connections("tcp") if c.pid in ours and c.status == psutil.CONN_LISTEN]
    assert listening
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
    assert (job_folder / "token").stat().st_mode & 0o777 == 0o600
    assert job_folder.stat().st_mode & 0o777 == 0o700


def test_the_death_of_the_warm_process_fails_the_world_and_the_next_start_has_another(job_folder, tmp_path):
    run = Run(job_folder, tmp_path, {"sleep": 0.05}, steps=60, max_failures=1)

    def kill_warm():
        when(lambda: len(run.of("step")) > 2)
        psutil.Process(run.pids()[0]).parent().kill()

    other = meanwhile(kill_warm)
    assert run.go().kind == "done"
    other.join()
    assert "the warm process that it was forked from ended" in run.of("failure")[0]["lines"][0]
    assert run.of("plan")[-1]["start_step"] > 0
