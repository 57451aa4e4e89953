"""The hands of a drill: what they do to processes is what kernels, people and lost hosts do to them, on whatever host they are.

Nothing here needs root: the processes are the user's own. On another host it is done by a task that Ray runs there. Everything
returns the moment at which it was done (``time.monotonic()``).
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
"""Between the order that all of a host be stopped or killed, and its execution: the task that gives it is on that host."""
ANSWER_S = 60.0
BACK_S = 90.0
"""How long hosts may take to join again."""
HOSTS_CHECK_S = 0.2


class FaultInjector:
    """Reaches the processes of a job: on this host, and, on the lasting cluster at ``address``, on every host of it."""

    def __init__(self, address: str | None) -> None:
        self.here: str | None = None
        """This host's node of the cluster; None where jobs have clusters of their own, of this host alone."""
        if address is not None:
            connect.join(address, "drill")
            self.here = ray.get_runtime_context().get_node_id()
        self.hosts = self._living()
        self.silent_until = 0.0

    def wait_for_hosts(self) -> None:
        """Wait until no host is cut off any more and all have joined again; but not for ever."""
        time.sleep(max(0.0, self.silent_until - time.monotonic()))
        give_up = time.monotonic() + BACK_S
        while self._living() < self.hosts and time.monotonic() < give_up:
            time.sleep(HOSTS_CHECK_S)

    def _living(self) -> int:
        return sum(node["Alive"] for node in ray.nodes()) if self.here else 0

    def signal(self, place: RankLocation, number: int) -> float:
        """Send a signal to the trainer of a rank."""
        return self._on(place, send, [place.pid], number)

    def limit_files(self, place: RankLocation, size: int) -> float:
        """Let no file that a rank's trainer writes grow beyond ``size`` bytes."""
        return self._on(place, limit, place.pid, size)

    def signal_everybody(self, job: TrainProcess, number: int) -> float:
        """Send a signal to every process of a job, as a batch system does."""
        assert job.process is not None
        driver = psutil.Process(job.process.pid)
        pids = [driver.pid, *(child.pid for child in driver.children(recursive=True))]
        now = time.monotonic()
        send(pids, number)
        for place in job.places if self.here else []:
            if place.pid not in pids or place.node != self.here:
                self._on(place, send, [place.pid, place.steward], number)
        return now

    def cut_off(self, places: Sequence[RankLocation], seconds: float) -> float:
        """Silence the host of these ranks: its processes of the job and of Ray stand still for so many seconds."""
        now = self._on(places[0], of_host, places, f"kill -STOP {{0}}; sleep {seconds}; kill -CONT {{0}}") + DELAY_S
        self.silent_until = now + seconds + HOSTS_CHECK_S
        return now

    def end_host(self, places: Sequence[RankLocation]) -> float:
        """SIGKILL the job's processes and Ray's on the host of these ranks, all at once."""
        return self._on(places[0], of_host, places, "kill -KILL {0}") + DELAY_S

    def _on(self, place: RankLocation, act: Callable[..., None], *given: Any) -> float:
        if self.here in (None, place.node):
            now = time.monotonic()
            act(*given)
            return now
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        task: Any = ray.remote(num_cpus=0, max_retries=0)(_do).options(scheduling_strategy=there)
        ray.get(task.remote(send, [], 0), timeout=ANSWER_S)  # the first task on a host waits seconds for its process
        now = time.monotonic()
        ray.get(task.remote(act, *given), timeout=ANSWER_S)
        return now


def _do(act: Callable[..., None], *given: Any) -> None:
    act(*given)


def send(pids: Sequence[int], number: int) -> None:
    """A signal to processes of this host; those that are gone are passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def limit(pid: int, size: int) -> None:
    """Takes away a process's right to write files beyond ``size`` bytes: the kernel refuses it, in the middle of a write."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))


def of_host(places: Sequence[RankLocation], line: str) -> None:
    """Has a shell that nobody waits for do ``line``, of which {0} is the processes of the job and of Ray on this host."""
    raylets = {psutil.Process(place.steward).parent() for place in places}
    found = {child for raylet in raylets if raylet for child in (raylet, *raylet.children(recursive=True))}
    for place in places:  # a warm process may be another's child, or nobody's
        with contextlib.suppress(psutil.Error):
            found |= {process for process in (psutil.Process(place.pid), psutil.Process(place.pid).parent()) if process}
    pids = " ".join(str(process.pid) for process in found)
    shell = ["sh", "-c", f"(sleep {DELAY_S}; {line.format(pids)}) >/dev/null 2>&1 </dev/null &"]
    subprocess.run(shell, start_new_session=True, check=True)
