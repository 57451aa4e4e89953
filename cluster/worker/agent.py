"""The agent of a host: a Ray actor that starts, watches and signals the workers of a job on its host.

It never trains itself, and so stays responsive whatever its workers do: it sees a death at once, reports what the
worker left in its log, and starts the next ones from the host's fork server in a fraction of a second. It outlives
every attempt of the job. Ray starts one in each slot, for a slot's GPU is only known to an actor in it; in an attempt
the first of a host speaks for all workers there, so that the driver hears each host and not each rank.
"""

from __future__ import annotations

import collections
import contextlib
import json
import mmap
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.device_health.nvml import GpuWatch
from cluster.host import job_dir, network, resources
from cluster.worker import fork_server_client, ipc
from cluster.worker.messages import BindResult, SlotInfo, StartOrder, StartResult
from cluster.worker.worker_handle import WorkerHandle, begin_log, log_tail
from train.distributed import heartbeat
from train.errors import ExitCode
from train.events import KINDS, ExitEvent
from train.util.reading import UNREADABLE, as_object

EVIDENCE_S = 2.0
"""How long the GPU of a worker that failed may take to answer, before its exit is reported without its counters."""
DEVICE_READ_S = 0.3
"""How long it may take to answer while the worker lives. Two of these, and the worker's stack, fit into an inspection.
"""
MOST_CONNECTING = 4096
"""Ranks that may be connecting to the rendezvous at the same moment; the kernel's own limit may be lower."""
QUIET_EVENTS = {"error", "stop_asked", "stop_agreed", "phase"}
"""Events that are passed on from ranks other than 0 too."""


@dataclass(frozen=True)
class PendingWorker:
    """A worker that the fork server was told to start, and has not answered for yet."""

    order: StartOrder
    connection: socket.socket
    read_fd: int
    """Of the pipe that its events come through."""
    memory: mmap.mmap
    """Of its heartbeat."""
    log_offset: int


class WorkerAgent:
    """A host's agent. Every method returns soon, except ``poll_events``, which waits for events."""

    fork_server_class: type[fork_server_client.ForkServerProcess] = fork_server_client.ForkServerProcess

    def __init__(self, job: str, target: str, device: str) -> None:
        self.folder = job_dir.own_folder(job)
        # A fork server that we start ends with us, and must not clean up what is the driver's.
        os.environ.pop(job_dir.JOB_ENV, None)
        resources.raise_file_limit()
        self.target = target
        self.device = device
        self.fork_server: fork_server_client.ForkServerProcess | None = None
        self.listener: socket.socket | None = None
        self.workers: dict[int, WorkerHandle] = {}
        """The workers that live, by rank."""
        self.events: collections.deque[dict[str, Any]] = collections.deque()
        self.events_added = threading.Condition()

    def describe_slot(self) -> SlotInfo:
        """The node, host name, address and GPUs that Ray gave this agent's slot."""
        context = ray.get_runtime_context()
        return SlotInfo(
            node=context.get_node_id(),
            host=socket.gethostname(),
            ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            gpus=tuple(context.get_accelerator_ids().get("GPU", [])),
        )

    def start_fork_server(self) -> None:
        """Has the host's fork server begin its imports, before any worker is asked for."""
        self._connect_fork_server().close()

    def bind_rendezvous(self, ip: str, port: int) -> BindResult:
        """Binds the socket where the next attempt's workers meet; asked of rank 0's host. Port 0: any free one."""
        if self.listener is not None:
            self.listener.close()
        self.listener = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind((ip, port))
        except OSError as error:
            self.listener.close()
            self.listener = None
            return BindResult(error=error.strerror or str(error))
        self.listener.listen(MOST_CONNECTING)
        return BindResult(port=self.listener.getsockname()[1])

    def start_workers(self, orders: Sequence[StartOrder]) -> list[StartResult]:
        """Starts the workers that ``orders`` describe, all at once, and watches them from then on."""
        self.kill_workers()
        interface = network.interface_of(self.describe_slot().ip) or ""
        started = [self._send_order(replace(order, interface=interface)) for order in orders]
        return [self._await_worker(each) for each in started]

    def _send_order(self, order: StartOrder) -> PendingWorker:
        """Sends the fork server an order, each by a connection of its own, which lasts as long as the worker."""
        log_offset = begin_log(Path(order.log))
        connection = self._connect_fork_server()
        read_fd, write_fd = os.pipe()
        memory = os.memfd_create("heartbeat")
        os.ftruncate(memory, heartbeat.SIZE)
        fds = [write_fd, memory]
        listener = self.listener if order.rank == 0 else None
        if listener is not None:
            fds.append(listener.fileno())
        ipc.send(connection, order.to_json(), fds)
        os.close(write_fd)
        shared = mmap.mmap(memory, heartbeat.SIZE, prot=mmap.PROT_READ)
        os.close(memory)
        if listener is not None:
            listener.close()
            self.listener = None
        return PendingWorker(order, connection, read_fd, shared, log_offset)

    def _await_worker(self, pending: PendingWorker) -> StartResult:
        """The fork server's answer to an order; watches the worker from here on."""
        answer, _ = ipc.receive(pending.connection)
        if answer is None or "pid" not in answer:
            pending.connection.close()
            os.close(pending.read_fd)
            if answer and "refused" in answer:
                return StartResult(refused=answer["refused"])
            lost = f"the warm process ended; its log is {self.folder / 'warm.log'}"
            return StartResult(failed=answer["failed"] if answer else lost)
        worker = WorkerHandle(answer["pid"], pending.order, pending.memory, pending.log_offset)
        worker.gpu = GpuWatch(pending.order.gpus) if self.device == "gpu" else None
        self.workers[pending.order.rank] = worker
        arguments = pending.connection, pending.read_fd, worker
        threading.Thread(target=self._watch_worker, args=arguments, daemon=True).start()
        return StartResult(answer["pid"], answer["ready"])

    def _connect_fork_server(self) -> socket.socket:
        """A connection to the host's fork server, which is started here if there is none."""
        with fork_server_client.start_lock(self.folder):
            connection = fork_server_client.connect_fork_server(self.folder)
            if connection is None:
                if self.fork_server is not None:
                    self.fork_server.close()
                self.fork_server = self.fork_server_class(self.folder, self.target)
                self.fork_server.set_device(self.device)
                connection = fork_server_client.connect_fork_server(self.folder)
        if connection is None:
            raise RuntimeError(f"the warm process does not answer; its log is {self.folder / 'warm.log'}")
        return connection

    def poll_events(self, wait_s: float) -> list[dict[str, Any]]:
        """The events since the last call, and last the workers' heartbeats; waits up to ``wait_s`` for an event."""
        with self.events_added:
            self.events_added.wait_for(lambda: bool(self.events), wait_s)
            events = list(self.events)
            self.events.clear()
        return [*events, *(worker.heartbeat() for worker in list(self.workers.values()))]

    def signal_workers(self, number: int, pids: Sequence[int]) -> None:
        """Sends the workers of those pids a signal, if they live. One that comes late is not for the next workers."""
        for worker in list(self.workers.values()):
            if worker.pid in pids:
                worker.signal(number)

    def inspect_workers(self) -> dict[int, dict[str, Any]]:
        """Where the workers are, all asked at once.

        By rank: {"kernel": [what /proc says], "stack": [its Python frames], "flight": [its groups]}, on a GPU also
        "evidence" of that. Needs no cooperation, so it works for a worker that hangs; one that is stopped runs on for
        the moment that its stack takes.
        """
        workers = dict(self.workers)
        if not workers:
            return {}
        with ThreadPoolExecutor(len(workers)) as threads:
            answers = dict(zip(workers, threads.map(_inspect, workers.values()), strict=True))
        told = set()
        for answer in answers.values():
            for record in answer["flight"]:  # the members of a group may be a thousand: one rank of a host tells them
                group = record["group"], record["backend"]
                if group in told:
                    record["members"] = []
                elif record["members"]:
                    told.add(group)
        return answers

    def read_devices(self) -> dict[int, dict[str, Any] | None]:
        """The counters of the workers' GPUs now, by rank; None where a GPU does not answer."""
        states = {}
        for rank, worker in list(self.workers.items()):
            if worker.gpu is not None:
                _, state = worker.gpu.read(DEVICE_READ_S)
                states[rank] = state.to_json() if state is not None else None
        return states

    def kill_workers(self) -> None:
        """Ends the workers at once, if there are any."""
        for worker in list(self.workers.values()):
            worker.signal(signal.SIGKILL)

    def _add_event(self, record: dict[str, Any]) -> None:
        with self.events_added:
            self.events.append(record)
            self.events_added.notify_all()

    def _watch_worker(self, connection: socket.socket, read_fd: int, worker: WorkerHandle) -> None:
        """Collects a worker's events until it ends, then how it ended. Runs in a thread of its own."""
        kills_before = resources.oom_kills()
        pending = b""
        ended: ipc.Message | None = None
        alive = True
        while alive:
            ready, _, _ = select.select([connection.fileno(), read_fd], [], [])
            if connection.fileno() in ready:
                ended, _ = ipc.receive(connection)
                alive = False
            if read_fd in ready or not alive:
                pending = self._add_worker_events(pending + _read_available(read_fd), worker.identity)
        os.close(read_fd)
        connection.close()
        code = ended["exit"] if ended else -signal.SIGKILL
        event = ExitEvent(code, worker.pid, time.time(), **worker.identity)
        if code not in (ExitCode.OK, ExitCode.STOPPED) and not (worker.killed and code == -signal.SIGKILL):
            event = replace(
                event,
                tail=log_tail(worker.log, worker.log_offset),
                peak_mib=ended["peak_kib"] // 1024 if ended else None,
                memory_mib=psutil.virtual_memory().total >> 20,
                oom=resources.oom_kills() - kills_before,
                orphaned=ended is None,
                evidence=worker.gpu.collect(EVIDENCE_S).to_json() if worker.gpu else None,
            )
        record = replace(event, at=worker.heartbeat()).to_json()
        if self.workers.get(worker.identity["rank"]) is worker:
            del self.workers[worker.identity["rank"]]
        worker.close()
        self._add_event(record)

    def _add_worker_events(self, data: bytes, identity: dict[str, Any]) -> bytes:
        """Adds the events of the whole lines in ``data``; returns the incomplete line at its end."""
        lines, _, rest = data.rpartition(b"\n")
        for event in read_events(lines):
            if identity["rank"] == 0 or event["event"] in QUIET_EVENTS:
                self._add_event({"t": time.time(), **event, **identity})
        return rest


def read_events(lines: bytes) -> list[dict[str, Any]]:
    """The events in JSON lines of a worker. Any process that a worker starts may write into its pipe: the rest is left.

    A line that is no event must not end the thread that waits for the worker's end.
    """
    events = []
    for line in lines.split(b"\n"):
        with contextlib.suppress(*UNREADABLE):
            event = as_object(json.loads(line))
            if event["event"] in KINDS:
                events.append(event)
    return events


def _inspect(worker: WorkerHandle) -> dict[str, Any]:
    evidence = {"evidence": worker.gpu.collect(DEVICE_READ_S).to_json()} if worker.gpu else {}
    return worker.inspect() | evidence


def _read_available(fd: int) -> bytes:
    """All that can be read from a pipe now. A worker's own children may keep it open, so its end is not waited for."""
    data = b""
    while select.select([fd], [], [], 0)[0]:
        part = os.read(fd, 1 << 16)
        if not part:
            break
        data += part
    return data
