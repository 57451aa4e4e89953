"""A whole job as its user sees it: a driver process, its exit code, its output, and what it leaves behind."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
TESTS = REPOSITORY / "tests"
ENDLESS = {"steps": 100000}
SLOW = json.dumps({"sleep": 0.05})


class Driver:
    """One running ``drive.py``; everything it starts is found by the environment variable it inherits."""

    def __init__(self, tmp_path, fault="{}", terminal=None, ignored=(), **settings):
        """``terminal``: the descriptor of one that it has and writes to, in place of a file; ``ignored``: signals."""
        self.run_dir = tmp_path / "run"
        self.mark = f"TRIREME_TEST={tmp_path}"
        self.out = tmp_path / f"out_{time.monotonic_ns()}"
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}", "TRIREME_TEST": str(tmp_path)}
        with self.out.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, TESTS / "helpers/drive.py", self.run_dir, fault, json.dumps(settings)],
                env=environment,
                stdout=terminal or file,
                stderr=terminal or file,
                stdin=terminal or subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=lambda: set_signals(terminal, ignored),
            )

    def text(self):
        return self.out.read_text()

    def wait(self, seconds=60):
        return self.process.wait(seconds)

    def until_training(self):
        self.until(
            lambda: (self.run_dir / "progress").exists() and int((self.run_dir / "progress").read_text() or 0) > 2
        )

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)

    def alive(self):
        """Every living process of this job, the driver included."""
        living = []
        for process in psutil.process_iter(["pid", "name"]):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and self.mark in process_environment(process):
                    living.append(process)
            except (psutil.Error, OSError):
                continue
        return living

    def expect_nothing_left(self, seconds=5):
        end = time.monotonic() + seconds
        while left := self.alive():
            assert time.monotonic() < end, [(p.pid, p.cmdline()) for p in left]
            time.sleep(0.05)


def set_signals(terminal, ignored):
    """Runs in the driver's process: tests under nohup or in the background pass on that signals are ignored."""
    if terminal is not None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


def process_environment(process):
    return Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace").split("\0")


@pytest.fixture
def start(tmp_path):
    drivers = []

    def begin(*args, **settings):
        drivers.append(Driver(tmp_path, *args, **settings))
        return drivers[-1]

    yield begin
    for driver in drivers:
        for process in driver.alive():
            process.kill()
        driver.process.wait()


def test_run_shows_its_progress_and_the_next_command(start):
    driver = start(steps=5)
    assert driver.wait() == 0
    text = driver.text()
    for words in (
        "2 workers, 1 core each",
        "ZeRO stage 2",
        "step 5/5",
        "Done",
        "generate run.dir=",
        "seconds to the first step",
    ):
        assert words in text
    assert "\x1b" not in text
    marks = json.loads((driver.run_dir / "startup.json").read_text())
    assert {"config", "ray", "workers", "imports", "first_step_done"} <= marks.keys()
    driver.expect_nothing_left()


def test_sigterm_saves_and_exits_75_and_a_second_job_is_refused(start):
    driver = start(SLOW, **ENDLESS)
    driver.until_training()
    other = start(SLOW, **ENDLESS)
    assert other.wait() == 2
    assert f"in use by another job: pid {driver.process.pid} on" in other.text()
    driver.process.terminate()
    assert driver.wait(15) == 75
    assert "Stopped and saved. Run the same command again to go on" in driver.text()
    driver.expect_nothing_left()


def test_terminal_that_nobody_reads_and_that_closes_saves_and_exits_75(start):
    ours, theirs = pty.openpty()
    driver = start(SLOW, terminal=theirs, **ENDLESS)
    os.close(theirs)
    driver.until_training()
    os.close(ours)  # the kernel sends SIGHUP, and whatever is written from now on fails
    assert driver.wait(30) == 75
    driver.expect_nothing_left()


def test_hangup_is_no_matter_to_a_job_under_nohup(start):
    driver = start(SLOW, ignored=[signal.SIGHUP], steps=60)
    driver.until_training()
    driver.process.send_signal(signal.SIGHUP)
    assert driver.wait() == 0
    assert "stopping" not in driver.text()


def test_signal_to_every_process_saves_and_exits_75(start):
    driver = start(SLOW, **ENDLESS)
    driver.until_training()
    for process in driver.alive():
        process.terminate()
    assert driver.wait(30) == 75, driver.text()
    assert "Stopped and saved" in driver.text()
    driver.expect_nothing_left()


def test_second_signal_ends_everything_now(start):
    # rank 1 never comes back from its step, so the first signal can not be heeded
    driver = start(json.dumps({"rank": 1, "step": 5, "do": "hang"}), **ENDLESS)
    driver.until_training()
    driver.process.send_signal(signal.SIGINT)
    driver.until(lambda: "stopping" in driver.text(), 30)
    assert driver.process.poll() is None
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait(20) == 130
    driver.expect_nothing_left()


def test_killed_driver_leaves_nothing_running(start):
    driver = start(SLOW, **ENDLESS)
    driver.until_training()
    assert len(driver.alive()) > 6
    driver.process.kill()
    driver.wait()
    driver.expect_nothing_left(seconds=30)  # Ray's own agents look for their raylet every few seconds


@pytest.mark.parametrize("delay", [0.5, 1.5])
def test_signal_during_the_start_exits_75_at_once(start, delay):
    driver = start(**ENDLESS)
    time.sleep(delay)
    driver.process.terminate()
    began = time.monotonic()
    assert driver.wait(10) == 75
    assert time.monotonic() - began < 5
    assert "before training began" in driver.text()
    driver.expect_nothing_left()


def test_more_workers_than_cores_fail_in_seconds_with_the_cure(start):
    began = time.monotonic()
    driver = start(workers=16, cpus_per_worker=16)
    assert driver.wait() == 2
    assert time.monotonic() - began < 20
    assert "cluster.workers=16" in driver.text()
    assert "short of another" in driver.text()


def test_run_folder_that_cannot_be_made_is_refused(start, tmp_path):
    (tmp_path / "run").write_text("a file is in the way")
    driver = start()
    assert driver.wait() == 2
    assert "cannot be written" in driver.text()


def test_cluster_that_does_not_answer_is_refused(start):
    driver = start(address="127.0.0.1:1")
    assert driver.wait() == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in driver.text()


def fork_servers(driver):
    """The fork servers of a job; the workers that they forked have the same command line, and are their children."""
    processes = [process for process in driver.alive() if "cluster.worker.fork_server" in process.cmdline()]
    pids = {process.pid for process in processes}
    return [process for process in processes if process.ppid() not in pids]


def test_fork_server_that_an_agent_started_ends_with_the_job(start):
    driver = start(SLOW, **ENDLESS)
    driver.until_training()
    [first] = fork_servers(driver)
    first.suspend()  # else it would fork another spare
    for child in first.children():
        child.kill()
    first.kill()
    driver.until(lambda: "recovered" in driver.text())
    [second] = fork_servers(driver)
    assert second.ppid() != driver.process.pid
    second.parent().kill()
    driver.until(lambda: driver.text().count("recovered") == 2)
    driver.process.terminate()
    assert driver.wait(30) == 75, driver.text()
    driver.expect_nothing_left(seconds=30)


def test_error_in_the_driver_is_shown_and_exits_1(start):
    driver = start(bug=True)
    assert driver.wait() == 1, driver.text()
    assert "RuntimeError: the oar broke" in driver.text()
    driver.expect_nothing_left()
