"""A worker's stack, asked of a real process that is stopped among many threads."""

import mmap
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from cluster.worker import procfs
from cluster.worker.worker_handle import LOG_BYTES, WorkerHandle, begin_log
from train.distributed import heartbeat

STOPPED = """
import faulthandler, os, signal, sys, threading, time
faulthandler.register(signal.SIGUSR1, 2)
for _ in range(16):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def walks_away():
    while True:
        pass
def stops_here():
    os.kill(os.getpid(), signal.SIGSTOP)
stops_here()
walks_away()
"""


@pytest.fixture(scope="module")
def busy_machine():
    """More work than cores: who runs first when all threads may go on is then left to chance."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    yield
    for process in spinning:
        process.kill()
        process.wait()


@pytest.mark.parametrize("attempt", range(5))
def test_stack_of_a_stopped_process_is_where_it_stopped(tmp_path, busy_machine, order, attempt):
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen([sys.executable, "-c", STOPPED], stderr=file) as process:
        try:
            end = time.monotonic() + 30
            while procfs.process_state(process.pid) != "T":
                assert time.monotonic() < end
                time.sleep(0.01)
            memory = mmap.mmap(-1, heartbeat.SIZE)
            answer = WorkerHandle(process.pid, replace(order, log=str(log)), memory, 0).inspect()
        finally:
            process.send_signal(signal.SIGKILL)
    assert answer["kernel"][0].startswith("state T: stopped by a signal")
    assert any("in stops_here" in frame for frame in answer["stack"]), answer["stack"]


def test_log_that_grew_too_large_is_put_aside_at_the_next_start(tmp_path):
    log = tmp_path / "rank_3.log"
    assert begin_log(log) == 0
    log.write_bytes(b"x" * LOG_BYTES)
    assert begin_log(log) == LOG_BYTES  # what the last attempts said stays
    for content in (b"older", b"newer"):
        log.write_bytes(content + b"x" * LOG_BYTES)
        assert begin_log(log) == 0
    assert not log.exists()
    assert log.with_name("rank_3.log.1").read_bytes().startswith(b"newer")
    assert len(list(tmp_path.iterdir())) == 1
