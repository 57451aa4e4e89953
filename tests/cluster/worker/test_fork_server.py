"""The fork server's orders for a GPU whose last worker has not ended yet, and its spare; jobs test the rest."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from bench.tools.simulated_ranks import SimulatedForkServerProcess
from cluster.worker import ipc
from cluster.worker.fork_server import SPARE_NAME, ForkedWorker, ForkServer
from cluster.worker.fork_server_client import connect_fork_server
from train.distributed import heartbeat

LIMIT_S = 60.0


class CountingServer(ForkServer):
    """A fork server that starts a process that sleeps where it would fork a rank."""

    def _fork_worker(self, agent, order, fds):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        process.returncode = 0  # reaped by the fork server, not by subprocess
        self.workers[process.pid] = ForkedWorker(process.pid, agent, order.gpus, order.stop_grace)


def started(server):
    return sorted(gpu for worker in server.workers.values() for gpu in worker.gpus)


def test_gpu_is_given_to_the_next_worker_when_the_last_one_is_gone(order):
    server = CountingServer(None, "module:function")
    agent, other = socket.socketpair()
    with agent, other:
        server._start_or_hold_back(agent, replace(order, gpus=("0",)), [])
        server._start_or_hold_back(agent, replace(order, gpus=("1",)), [])
        [old] = [pid for pid, worker in server.workers.items() if worker.gpus == ("0",)]
        fds = list(os.pipe())
        server._start_or_hold_back(other, replace(order, gpus=("0",)), fds)
        server._start_held_back()  # another worker has ended
        assert started(server) == ["0", "1"]
        os.kill(old, signal.SIGKILL)
        os.waitid(os.P_PID, old, os.WEXITED | os.WNOWAIT)
        server._reap_workers()
        assert started(server) == ["1"]
        server._start_held_back()
        assert started(server) == ["0", "1"]
        assert not server.held_back
        for fd in fds:
            os.close(fd)
        # ranks on CPUs share the host
        server._start_or_hold_back(agent, replace(order, gpus=()), [])
        server._start_or_hold_back(agent, replace(order, gpus=()), [])
        assert len(server.workers) == 4
        # an order whose agent has gone meanwhile is dropped, with its files
        read, write = os.pipe()
        gone, peer = socket.socketpair()
        server._start_or_hold_back(gone, replace(order, gpus=("1",)), [read, write])
        gone.close()
        peer.close()
        server._start_held_back()
        assert not server.held_back
        assert not Path(f"/proc/self/fd/{write}").exists()
        for pid in list(server.workers):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_spare_takes_the_place_of_a_killed_fork_server(order, tmp_path):
    """Also when the spare itself was killed before; the killed one's worker ends, and no process outlives the owner."""
    board = json.dumps({"board": str(tmp_path / "board"), "steps": 1_000_000, "work_s": 0.01})
    order = replace(order, size=1, corpus=board, log=str(tmp_path / "run" / "logs" / "rank_0.log"))
    Path(order.log).parent.mkdir(parents=True)
    owner = SimulatedForkServerProcess(tmp_path, "module:function")
    try:
        owner.set_device("cpu")
        agent, worker = start_worker(tmp_path, order)
        first = psutil.Process(owner.process.pid)
        first_name = first.name()
        lost = spare_of(first)
        lost.kill()
        spare = spare_of(first, but=lost)
        first.kill()
        assert ipc.receive(agent) == (None, [])  # the agent sees it at once
        psutil.wait_procs([worker], timeout=LIMIT_S)
        assert not worker.is_running()
        _, later = start_worker(tmp_path, order)
        assert later.parent() == spare
        assert spare.name() == first_name
        assert spare_of(spare)
    finally:
        owner.close()
    _, left = psutil.wait_procs([spare, later], timeout=LIMIT_S)
    assert not left


def start_worker(folder, order):
    """A connection by which a worker was ordered, and the worker."""
    agent = connect_fork_server(folder)
    _, write = os.pipe()
    memory = os.memfd_create("heartbeat")
    os.ftruncate(memory, heartbeat.SIZE)
    ipc.send(agent, order.to_json(), [write, memory])
    os.close(write)
    os.close(memory)
    answer, _ = ipc.receive(agent)
    return agent, psutil.Process(answer["pid"])


def spare_of(server, but=None):
    """The spare of a fork server, once it has one, another than ``but``."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        for child in server.children():
            if child != but and child.name() == SPARE_NAME:
                return child
        time.sleep(0.02)
    raise AssertionError("no spare was forked")


def test_worker_without_an_agent_has_the_grace_of_its_order_to_save(order):
    """Once everybody was told to end; without such a signal it is killed at once."""
    server, ends = CountingServer(None, "module:function"), {}
    for grace in (0.2, 60.0):
        agent, other = socket.socketpair()
        server._start_or_hold_back(agent, replace(order, stop_grace=grace), [])
        pid = list(server.workers)[-1]
        ends[grace] = pid
        server.workers[pid].orphaned = time.monotonic() - 1
        agent.close()
        other.close()
    server._note_stop_signal(signal.SIGTERM, None)
    server._kill_orphans()
    assert os.WIFSIGNALED(os.waitpid(ends[0.2], 0)[1])
    assert os.waitpid(ends[60.0], os.WNOHANG) == (0, 0)
    server.stop_signalled = False
    del server.workers[ends[0.2]]
    server._kill_orphans()
    assert os.WIFSIGNALED(os.waitpid(ends[60.0], 0)[1])
