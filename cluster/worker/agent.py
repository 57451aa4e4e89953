"""The agent of a rank: a Ray actor that starts, watches and signals the rank's worker.

It never trains itself, and so stays responsive whatever its worker does: it sees a death at once, reports what the
worker left in its log, and starts the next one from the host's fork server in a fraction of a second. It outlives every
attempt of the job.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.device_health.nvml import GpuWatch
from cluster.host import job_dir, network, resources
from cluster.worker import fork_server_client, ipc
from cluster.worker.messages import BindResult, SlotInfo, StartOrder, StartResult
from cluster.worker.worker_handle import WorkerHandle, log_tail
from train.distributed import heartbeat
from train.errors import ExitCode
from train.events import KINDS, ExitEvent
from train.util.reading import UNREADABLE, as_object

EVIDENCE_S = 2.0
"""How long the GPU of a worker that failed may take to answer, before its exit is reported without its counters."""
DEVICE_READ_S = 0.3
"""How long it may take to answer while the worker lives. Two of these, and the worker's stack, fit into an inspection.
"""
QUIET_EVENTS = {"error", "stop_asked", "stop_agreed", "phase"}
"""Events that are passed on from ranks other than 0 too."""


class WorkerAgent:
    """One rank's agent. Every method returns at once, except ``poll_events``, which waits for some."""

    def __init__(self, job: str, target: str, device: str) -> None:
        self.folder = job_dir.own_folder(job)
        # A fork server that we start ends with us, and must not clean up what is the driver's.
        os.environ.pop(job_dir.JOB_ENV, None)
        resources.raise_file_limit()
        self.target = target
        self.device = device
        self.fork_server: fork_server_client.ForkServerProcess | None = None
        self.listener: socket.socket | None = None
        self.worker: WorkerHandle | None = None
        self.gpu: GpuWatch | None = None
        self.events: collections.deque[dict[str, Any]] = collections.deque()
        self.events_added = threading.Condition()

    def describe_slot(self) -> SlotInfo:
        """The node, host name, address and GPUs that Ray gave this rank."""
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
        """Binds the socket where the next attempt's workers meet; asked of rank 0's agent. Port 0: any free one."""
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
        self.listener.listen(1024)
        return BindResult(port=self.listener.getsockname()[1])

    def start_worker(self, order: StartOrder) -> StartResult:
        """Starts the worker that ``order`` describes, and watches it from then on."""
        self.kill_worker()
        log = Path(order.log)
        log_offset = log.stat().st_size if log.exists() else 0
        connection = self._connect_fork_server()
        read_fd, write_fd = os.pipe()
        memory = os.memfd_create("heartbeat")
        os.ftruncate(memory, heartbeat.SIZE)
        fds = [write_fd, memory]
        if self.listener is not None:
            fds.append(self.listener.fileno())
        slot = self.describe_slot()
        order = replace(order, gpus=slot.gpus, interface=network.interface_of(slot.ip) or "")
        ipc.send(connection, order.to_json(), fds)
        os.close(write_fd)
        shared = mmap.mmap(memory, heartbeat.SIZE, prot=mmap.PROT_READ)
        os.close(memory)
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        answer, _ = ipc.receive(connection)
        if answer is None or "pid" not in answer:
            connection.close()
            os.close(read_fd)
            if answer and "refused" in answer:
                return StartResult(refused=answer["refused"])
            lost = f"the warm process ended; its log is {self.folder / 'warm.log'}"
            return StartResult(failed=answer["failed"] if answer else lost)
        self.worker = WorkerHandle(answer["pid"], order, shared, log_offset)
        arguments = connection, read_fd, self.worker, self.describe_slot().gpus
        threading.Thread(target=self._watch_worker, args=arguments, daemon=True).start()
        return StartResult(answer["pid"], answer["ready"])

    def _connect_fork_server(self) -> socket.socket:
        """A connection to the host's fork server, which is started here if there is none."""
        with fork_server_client.start_lock(self.folder):
            connection = fork_server_client.connect_fork_server(self.folder)
            if connection is None:
                if self.fork_server is not None:
                    self.fork_server.close()
                self.fork_server = fork_server_client.ForkServerProcess(self.folder, self.target)
                self.fork_server.set_device(self.device)
                connection = fork_server_client.connect_fork_server(self.folder)
        if connection is None:
            raise RuntimeError(f"the warm process does not answer; its log is {self.folder / 'warm.log'}")
        return connection

    def poll_events(self, wait_s: float) -> list[dict[str, Any]]:
        """The events since the last call, and last the worker's heartbeat; waits up to ``wait_s`` for an event."""
        with self.events_added:
            self.events_added.wait_for(lambda: bool(self.events), wait_s)
            events = list(self.events)
            self.events.clear()
        return [*events, self.worker.heartbeat()] if self.worker else events

    def signal_worker(self, number: int, pid: int) -> None:
        """Sends the worker of that pid a signal, if it lives. One that comes late is not for the next worker."""
        if self.worker and self.worker.pid == pid:
            self.worker.signal(number)

    def inspect_worker(self) -> dict[str, Any]:
        """Where the worker is: {"kernel": [what /proc says], "stack": [its Python frames], "flight": [its groups]}.

        On a GPU also "evidence" of that.

        Needs no cooperation, so it works for a worker that hangs; one that is stopped runs on for the moment that its
        stack takes.
        """
        evidence = {"evidence": self.gpu.collect(DEVICE_READ_S).to_json()} if self.gpu else {}
        answer = self.worker.inspect() if self.worker else {"kernel": [], "stack": [], "flight": []}
        return answer | evidence

    def read_device(self) -> dict[str, Any] | None:
        """The counters of the worker's GPU now; None where it has none, or it does not answer."""
        _, state = self.gpu.read(DEVICE_READ_S) if self.gpu else (False, None)
        return state.to_json() if state is not None else None

    def kill_worker(self) -> None:
        """Ends the worker at once, if there is one."""
        if self.worker:
            self.worker.signal(signal.SIGKILL)

    def _add_event(self, record: dict[str, Any]) -> None:
        with self.events_added:
            self.events.append(record)
            self.events_added.notify_all()

    def _watch_worker(self, connection: socket.socket, read_fd: int, worker: WorkerHandle, gpus: Sequence[str]) -> None:
        """Collects a worker's events until it ends, then how it ended. Runs in a thread of its own."""
        kills_before = resources.oom_kills()
        gpu = self.gpu = GpuWatch(gpus) if self.device == "gpu" else None
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
        if code not in (ExitCode.OK, ExitCode.STOPPED):
            event = replace(
                event,
                host=socket.gethostname(),
                tail=log_tail(worker.log, worker.log_offset),
                peak_mib=ended["peak_kib"] // 1024 if ended else None,
                memory_mib=psutil.virtual_memory().total >> 20,
                oom=resources.oom_kills() - kills_before,
                orphaned=ended is None,
                evidence=gpu.collect(EVIDENCE_S).to_json() if gpu else None,
            )
        record = replace(event, at=worker.heartbeat()).to_json()
        if self.worker is worker:
            self.worker = None
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


def _read_available(fd: int) -> bytes:
    """All that can be read from a pipe now. A worker's own children may keep it open, so its end is not waited for."""
    data = b""
    while select.select([fd], [], [], 0)[0]:
        part = os.read(fd, 1 << 16)
        if not part:
            break
        data += part
    return data
