"""A job's driver over simulated hosts, for ``bench scale``: the product's own driver, supervisor, agents and verdicts.

    python -m bench.tools.simulated_hosts WORKERS_A_HOST WORK_S [key=value ...]

Ray, its actors, the agents' code and the fork server are real. Three things stand for a cluster: a Ray node that says
it has a core for each rank; the agents of many hosts share a process of Ray's, which has no memory for all of them on
one machine; and the ranks train nothing (``simulated_ranks``). Events go to ``events.jsonl`` in the run's folder, with
the time at which the driver showed them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil
import ray

from bench.tools.simulated_ranks import SimulatedForkServerProcess
from cluster.driver.early_start import EarlyStart, start_early
from cluster.driver.train_driver import TrainDriver
from cluster.host import resources
from cluster.host.stop_request import StopSignals
from cluster.raycluster import ray_auth, ray_node
from cluster.raycluster.local_cluster import LocalRayCluster
from cluster.supervision.slots import JobSlots, Slot
from cluster.supervision.supervisor import Supervisor
from cluster.worker.agent import WorkerAgent
from cluster.worker.messages import SlotInfo
from train.config.schema import Config

TARGET = "bench.tools.simulated_ranks:run"
HOSTS_A_PROCESS = 16
THREADS_AN_AGENT = 4
WORKERS_ENV = "TRIREME_BENCH_WORKERS"


def single_hosts(hosts: int) -> set[int]:
    """Hosts whose agents have a process of their own, so that each can be lost alone."""
    return {1 % hosts, hosts // 2, hosts - 1}


def host_name(host: int) -> str:
    """The name, and the node's id, of a simulated host."""
    return f"host-{host:04}"


class SimulatedAgent(WorkerAgent):
    """The product's agent, on a host that it is told."""

    fork_server_class = SimulatedForkServerProcess

    def __init__(self, job: str, target: str, host: int) -> None:
        super().__init__(job, target, "cpu")
        self.host = host

    def describe_slot(self) -> SlotInfo:
        """The simulated host, with an address of this machine's own."""
        name, address = host_name(self.host), f"127.0.{self.host // 250 + 1}.{self.host % 250 + 1}"
        return SlotInfo(name, name, address, os.getpid())


class HostProcess:
    """An actor of Ray's in which the agents of several simulated hosts live."""

    def __init__(self, job: str, target: str, number: int) -> None:
        """``number``: of this process among its like, for a job folder, and so a fork server, of its own."""
        self.job, self.target = f"{job}-{number}", target
        self.agents: dict[int, SimulatedAgent] = {}
        self.lock = threading.Lock()

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def call(self, host: int, slot: int, method: str, arguments: Sequence[Any]) -> Any:
        """Calls a method of the agent in a slot, which is made where there is none."""
        with self.lock:
            if slot not in self.agents:
                self.agents[slot] = SimulatedAgent(self.job, self.target, host)
        return getattr(self.agents[slot], method)(*arguments)

    def forget(self, slot: int) -> None:
        """Ends the agent in a slot with its workers."""
        with self.lock:
            agent = self.agents.pop(slot, None)
        if agent is not None:
            agent.kill_workers()


class RemoteAgent:
    """The handle of a simulated agent: used as Ray's own handles of actors are."""

    def __init__(self, process: Any, host: int, slot: int) -> None:
        self.process, self.host, self.slot = process, host, slot

    def __getattr__(self, method: str) -> RemoteMethod:
        return RemoteMethod(self, method)


class RemoteMethod:
    """A method of a simulated agent, to be called with ``remote``."""

    def __init__(self, agent: RemoteAgent, method: str) -> None:
        self.agent, self.method = agent, method

    def remote(self, *arguments: Any) -> Any:
        """Calls it: a reference to its answer."""
        return self.agent.process.call.remote(self.agent.host, self.agent.slot, self.method, arguments)


def end_agent(agent: RemoteAgent) -> None:
    """Ends an agent and leaves the others of its process alone."""
    agent.process.forget.remote(agent.slot)


class SimulatedSlots(JobSlots):
    """Slots on simulated hosts, so many on each; a host that was lost is replaced at once by one of the same name."""

    def __init__(self, job: Any, device: str) -> None:
        super().__init__(job, device)
        self.workers = int(os.environ[WORKERS_ENV])
        self.hosts = -(-job.config.cluster.worker_count // self.workers)
        self.processes: dict[int, tuple[Any, int]] = {}

    def reserve_slots(self, size: int, gang: Sequence[Slot] = ()) -> None:
        """Starts all processes at once, then reserves the slots as usual."""
        numbers = sorted({self._process_of(host) for host in range(self.hosts)})
        started = [self._start_process(number) for number in numbers]
        pids = ray.get([process.pid.remote() for process in started])
        self.processes = dict(zip(numbers, zip(started, pids, strict=True), strict=True))
        super().reserve_slots(size, gang)

    def node_lives(self, node: str) -> bool:
        """Whether the process of a simulated host lives."""
        return bool(psutil.pid_exists(self.processes[self._process_of(int(node.rpartition("-")[2]))][1]))

    def node_resources(self) -> dict[str, dict[str, float]]:
        """A core for each worker of each host."""
        return {host_name(host): {"CPU": float(self.workers)} for host in range(self.hosts)}

    def _process_of(self, host: int) -> int:
        return self.hosts + host if host in single_hosts(self.hosts) else host // HOSTS_A_PROCESS

    def _start_process(self, number: int) -> Any:
        threads = 8 + THREADS_AN_AGENT * HOSTS_A_PROCESS * self.workers
        actor = ray.remote(HostProcess).options(num_cpus=0, max_concurrency=threads)
        return actor.remote(self.job.folder, self.job.target, number)

    def _start_agent(self, slot: Slot) -> None:
        host = slot.index // self.workers
        number = self._process_of(host)
        process, pid = self.processes[number]
        if not psutil.pid_exists(pid):
            process = self._start_process(number)
            self.processes[number] = process, ray.get(process.pid.remote())
        slot.kill = end_agent
        slot.agent = RemoteAgent(process, host, slot.index)
        slot.info, slot.pending_info = None, slot.agent.describe_slot.remote()


class SimulatedSupervisor(Supervisor):
    """The product's supervisor, over simulated hosts."""

    slots_class = SimulatedSlots


class SimulatedDriver(TrainDriver):
    """The product's driver, over simulated hosts."""

    supervisor_class = SimulatedSupervisor

    def __init__(self, overrides: Sequence[str], early: EarlyStart, work_s: float) -> None:
        super().__init__(overrides, early)
        self.work_s = work_s

    def nodes_before_start(self, config: Config) -> None:
        """Nothing is known of simulated nodes before Ray has started."""

    def find_corpus(self, config: Config) -> str:
        """What the simulated ranks are told, in the place of a corpus."""
        return json.dumps({"board": str(self.early.folder / "board"), "work_s": self.work_s, "steps": config.steps})

    def connect_to_ray(self, config: Config) -> None:
        """Starts Ray on this host, which is said to have a core for each rank."""
        token = self.early.folder / "token"
        ray_auth.create_token(token)
        spec = ray_node.NodeSpec(ray_auth.LOOPBACK, self.early.folder, token, config.cluster.worker_count, 0)
        self.local_cluster = LocalRayCluster(spec, config.run.name or "")
        self.signals.install()
        self.clock.mark("ray")

    def _show(self, event: dict[str, Any]) -> None:
        with (self.run_dir / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"shown": time.time(), **event}) + "\n")
        super()._show(event)


def main(arguments: Sequence[str]) -> int:
    """Runs the job to its exit code."""
    workers, work_s, *overrides = arguments
    os.environ[WORKERS_ENV] = workers
    resources.raise_file_limit()
    signals = StopSignals()
    signals.install()
    return SimulatedDriver(overrides, start_early(signals, TARGET, SimulatedForkServerProcess), float(work_s)).main()


if __name__ == "__main__":
    from bench.tools import simulated_hosts  # so that Ray's processes import its classes by name

    sys.exit(simulated_hosts.main(sys.argv[1:]))
