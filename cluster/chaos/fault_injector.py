"""Injects faults into the processes of a job: signals, limits, cut-off and killed hosts.

Nothing here needs root: the processes are the user's own. On another host a task that Ray runs there does it. The
methods of ``FaultInjector`` return the moment of the injection (``time.monotonic()``).
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.chaos.train_process import RankLocation, TrainProcess
from cluster.raycluster import connect

DELAY_S = 0.5
"""Before all of a host is stopped or killed: the task that orders it runs on that host and has to return first."""
ANSWER_S = 60.0
BACK_S = 90.0
"""How long hosts may take to join again."""
HOSTS_CHECK_S = 0.2


class FaultInjector:
    """Reaches the processes of a job: on this host, or on every host of the lasting cluster at ``address``."""

    def __init__(self, address: str | None) -> None:
        self.local_node: str | None = None
        """Id of this host's node of the cluster; None where each job has a cluster of its own, on this host alone."""
        if address is not None:
            connect.join_lasting_cluster(address, "drill")
            self.local_node = ray.get_runtime_context().get_node_id()
        self.hosts = self._count_living_hosts()
        self.silent_until = 0.0

    def wait_for_hosts(self) -> None:
        """Waits until no host is cut off any more and all have joined again, at most ``BACK_S`` seconds."""
        time.sleep(max(0.0, self.silent_until - time.monotonic()))
        give_up = time.monotonic() + BACK_S
        while self._count_living_hosts() < self.hosts and time.monotonic() < give_up:
            time.sleep(HOSTS_CHECK_S)

    def _count_living_hosts(self) -> int:
        return sum(node["Alive"] for node in ray.nodes()) if self.local_node else 0

    def signal_worker(self, location: RankLocation, number: int) -> float:
        """Sends a signal to the worker of a rank."""
        return self._run_at(location, send_signal, [location.pid], number)

    def limit_file_size(self, location: RankLocation, size: int) -> float:
        """Lets no file that a rank's worker writes grow beyond ``size`` bytes."""
        return self._run_at(location, set_file_limit, location.pid, size)

    def signal_everybody(self, job: TrainProcess, number: int) -> float:
        """Sends a signal to every process of a job, as a batch system does."""
        assert job.process is not None
        driver = psutil.Process(job.process.pid)
        pids = [driver.pid, *(child.pid for child in driver.children(recursive=True))]
        now = time.monotonic()
        send_signal(pids, number)
        for location in job.locations if self.local_node else []:
            if location.pid not in pids or location.node != self.local_node:
                self._run_at(location, send_signal, [location.pid, location.agent_pid], number)
        return now

    def cut_off_host(self, locations: Sequence[RankLocation], seconds: float) -> float:
        """Silences the host of these ranks: its processes of the job and of Ray are stopped for so many seconds."""
        command = f"kill -STOP {{0}}; sleep {seconds}; kill -CONT {{0}}"
        now = self._run_at(locations[0], run_for_host, locations, command) + DELAY_S
        self.silent_until = now + seconds + HOSTS_CHECK_S
        return now

    def kill_host(self, locations: Sequence[RankLocation]) -> float:
        """Kills the job's processes and Ray's on the host of these ranks, all at once (SIGKILL)."""
        return self._run_at(locations[0], run_for_host, locations, "kill -KILL {0}") + DELAY_S

    def _run_at(self, location: RankLocation, act: Callable[..., None], *arguments: Any) -> float:
        """Runs ``act`` on the host of a rank; the moment at which it did."""
        if self.local_node in (None, location.node):
            now = time.monotonic()
            act(*arguments)
            return now
        there = NodeAffinitySchedulingStrategy(location.node, soft=False)
        task: Any = ray.remote(num_cpus=0, max_retries=0)(_call).options(scheduling_strategy=there)
        # The first task on a host waits seconds for its process: an empty one goes ahead.
        ray.get(task.remote(send_signal, [], 0), timeout=ANSWER_S)
        now = time.monotonic()
        ray.get(task.remote(act, *arguments), timeout=ANSWER_S)
        return now


def _call(act: Callable[..., None], *arguments: Any) -> None:
    act(*arguments)


def send_signal(pids: Sequence[int], number: int) -> None:
    """Sends a signal to processes of this host; those that have ended are passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def set_file_limit(pid: int, size: int) -> None:
    """Has the kernel refuse a process's writes beyond ``size`` bytes of a file (RLIMIT_FSIZE), in the middle of one."""
    hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def run_for_host(locations: Sequence[RankLocation], line: str) -> None:
    """Runs the shell command ``line`` in the background, after ``DELAY_S``, for this host's processes.

    {0} in it stands for the pids of the job and of Ray here; ``locations``: all ranks on this host.
    """
    raylets = [psutil.Process(location.agent_pid).parent() for location in locations]
    processes: set[psutil.Process] = set()
    for raylet in filter(None, raylets):
        processes.update([raylet, *raylet.children(recursive=True)])
    for location in locations:  # a fork server may be another's child, or nobody's
        with contextlib.suppress(psutil.Error):
            worker = psutil.Process(location.pid)
            processes.add(worker)
            if fork_server := worker.parent():
                processes.update([fork_server, *fork_server.children()])  # its spare
    pids = " ".join(str(process.pid) for process in processes)
    shell = ["sh", "-c", f"(sleep {DELAY_S}; {line.format(pids)}) >/dev/null 2>&1 </dev/null &"]
    subprocess.run(shell, start_new_session=True, check=True)
