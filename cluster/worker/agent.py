"""The steward of a rank: a Ray actor that starts, watches and signals the rank's trainer, and never trains itself.

It stays awake whatever its trainer does, so it sees a death at once, says what the trainer left in its log, and starts
the next one from the host's warm process in a fraction of a second. It outlives every start of a world.
"""

from __future__ import annotations

import collections
import json
import mmap
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.host import job_dir, network, resources
from cluster.worker import fork_server_client, ipc
from cluster.worker.worker_handle import WorkerHandle, tail
from train.distributed import heartbeat
from train.errors import ExitCode

QUIET_EVENTS = {"error", "stop_asked", "stop_agreed", "phase"}
"""What ranks other than 0 say that anybody needs to hear."""


class WorkerAgent:
    """One rank's steward. Every method returns at once, but ``poll``, which waits for news."""

    def __init__(self, job: str, target: str, device: str) -> None:
        self.folder = job_dir.own_folder(job)
        # A warm process that we start ends with us, and must not take for its own what is the driver's.
        os.environ.pop(job_dir.JOB_ENV, None)
        self.target = target
        self.device = device
        self.warm: fork_server_client.ForkServerProcess | None = None
        self.listener: socket.socket | None = None
        self.trainer: WorkerHandle | None = None
        self.news: collections.deque[dict[str, Any]] = collections.deque()
        self.changed = threading.Condition()

    def where(self) -> dict[str, Any]:
        """The node, host name, address and GPUs that Ray gave this rank."""
        context = ray.get_runtime_context()
        return {
            "node": context.get_node_id(),
            "host": socket.gethostname(),
            "ip": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "gpus": context.get_accelerator_ids().get("GPU", []),
        }

    def warm_up(self) -> None:
        """Has the host's warm process begin its imports, before anybody needs it."""
        self._connect().close()

    def listen(self, ip: str, port: int) -> dict[str, Any]:
        """Binds the socket where the next world meets (rank 0's steward): {"host", "port"}, or {"error"}."""
        if self.listener is not None:
            self.listener.close()
        self.listener = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind((ip, port))
        except OSError as error:
            self.listener.close()
            self.listener = None
            return {"error": error.strerror or str(error)}
        self.listener.listen(1024)
        return {"host": ip, "port": self.listener.getsockname()[1]}

    def start(self, order: dict[str, Any]) -> dict[str, Any]:
        """Starts the trainer that ``order`` describes: {"pid", "ready"}, or {"failed": why the imports failed}.

        order: job, rank, size, local_rank, meeting {host, port, generation}, config (JSON), corpus, log, env, threads.
        """
        self.kill()
        log = Path(order["log"])
        offset = log.stat().st_size if log.exists() else 0
        connection = self._connect()
        read_fd, write_fd = os.pipe()
        memory = os.memfd_create("pulse")
        os.ftruncate(memory, heartbeat.SIZE)
        fds = [write_fd, memory]
        if self.listener is not None:
            fds.append(self.listener.fileno())
        request = {**order, "env": {**order["env"], **self._own_env()}, "target": self.target, "device": self.device}
        ipc.send(connection, request, fds)
        os.close(write_fd)
        shared = mmap.mmap(memory, heartbeat.SIZE, prot=mmap.PROT_READ)
        os.close(memory)
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        answer, _ = ipc.receive(connection)
        if answer is None or "failed" in answer:
            connection.close()
            os.close(read_fd)
            return answer or {"failed": f"the warm process ended; its log is {self.folder / 'warm.log'}"}
        self.trainer = WorkerHandle(answer["pid"], order, shared, offset)
        threading.Thread(target=self._watch, args=(connection, read_fd, self.trainer), daemon=True).start()
        return answer

    def _own_env(self) -> dict[str, str]:
        """What only this host knows: the rank's device, and the network interface that the node's address is on."""
        where = self.where()
        env = {"CUDA_VISIBLE_DEVICES": ",".join(where["gpus"]) if self.device == "gpu" else ""}
        interface = network.interface_of(where["ip"])
        if interface is not None:
            env |= {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        return env

    def _connect(self) -> socket.socket:
        """A connection to the host's warm process, started here if nobody has."""
        with fork_server_client.start_lock(self.folder):
            connection = fork_server_client.connect_fork_server(self.folder)
            if connection is None:
                if self.warm is not None:
                    self.warm.close()
                self.warm = fork_server_client.ForkServerProcess(self.folder, self.target)
                self.warm.set_device(self.device)
                connection = fork_server_client.connect_fork_server(self.folder)
        if connection is None:
            raise RuntimeError(f"the warm process does not answer; its log is {self.folder / 'warm.log'}")
        return connection

    def poll(self, wait_s: float) -> list[dict[str, Any]]:
        """What happened since the last call, in order, and last how the trainer is now; waits up to ``wait_s`` for
        something to happen.
        """
        with self.changed:
            self.changed.wait_for(lambda: bool(self.news), wait_s)
            news = list(self.news)
            self.news.clear()
        return [*news, self.trainer.heartbeat()] if self.trainer else news

    def signal(self, number: int, pid: int) -> None:
        """Sends the trainer of that pid a signal, if it lives. One that comes late is not for the next trainer."""
        if self.trainer and self.trainer.pid == pid:
            self.trainer.signal(number)

    def inspect(self) -> dict[str, Any]:
        """Where the trainer is: {"kernel": [what /proc says], "stack": [its Python frames]}. The trainer is not asked, so it
        answers for one that hangs; one that is stopped runs on for the moment that its stack takes.
        """
        return self.trainer.inspect() if self.trainer else {"kernel": [], "stack": []}

    def kill(self) -> None:
        """Ends the trainer now."""
        if self.trainer:
            self.trainer.signal(signal.SIGKILL)

    def _tell(self, record: dict[str, Any]) -> None:
        with self.changed:
            self.news.append(record)
            self.changed.notify_all()

    def _watch(self, connection: socket.socket, read_fd: int, trainer: WorkerHandle) -> None:
        """Passes on what the trainer says until it ends, then how it ended. Runs in a thread of its own."""
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
                pending = self._pass_on(pending + _available(read_fd), trainer.world)
        os.close(read_fd)
        connection.close()
        code = ended["exit"] if ended else -signal.SIGKILL
        record: dict[str, Any] = {"event": "exit", "code": code, "pid": trainer.pid, "t": time.time(), **trainer.world}
        if code not in (ExitCode.OK, ExitCode.STOPPED):
            record["host"] = socket.gethostname()
            record["tail"] = tail(trainer.log, trainer.offset)
            record["peak_mib"] = ended["peak_kib"] // 1024 if ended else None
            record["memory_mib"] = psutil.virtual_memory().total >> 20
            record["oom"] = resources.oom_kills() - kills_before
            record["orphaned"] = ended is None
        record["at"] = trainer.heartbeat()
        if self.trainer is trainer:
            self.trainer = None
        trainer.close()
        self._tell(record)

    def _pass_on(self, data: bytes, world: dict[str, Any]) -> bytes:
        *lines, rest = data.split(b"\n")
        for line in lines:
            event = json.loads(line)
            if world["rank"] == 0 or event["event"] in QUIET_EVENTS:
                self._tell({"t": time.time(), **event, **world})
        return rest


def _available(fd: int) -> bytes:
    """All that can be read from a pipe now. A trainer's own children may keep it open, so its end is not waited for."""
    data = b""
    while select.select([fd], [], [], 0)[0]:
        part = os.read(fd, 1 << 16)
        if not part:
            break
        data += part
    return data
