"""The fork server's orders for a GPU whose last worker has not ended yet; its other work is tested with whole jobs."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from cluster.worker.fork_server import ForkedWorker, ForkServer


class CountingServer(ForkServer):
    """A fork server that starts a process that sleeps where it would fork a rank."""

    def _fork_worker(self, agent, order, fds):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        process.returncode = 0  # reaped by the fork server, not by subprocess
        self.workers[process.pid] = ForkedWorker(process.pid, agent, order.gpus)


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
