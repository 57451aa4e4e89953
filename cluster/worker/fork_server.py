"""The fork server of a host: imports torch, DeepSpeed and our code once, and forks the workers.

    python -m cluster.worker.fork_server TARGET LISTENING_FD       (started by ``fork_server_client.ForkServerProcess``)

A fork of it reaches its first step in a fraction of a second, where a fresh interpreter pays seconds of imports on
every start, for every rank. It never touches CUDA and starts no thread, for neither survives a fork. It sees its
children's deaths at once and reports them with their signal and peak memory.

Lifetime: its standard input is a pipe that its owner holds open. When the owner is gone, by any means, it ends, and the
kernel kills its workers with it. When the agent that asked for a worker is gone, that worker is killed: at once, or,
where everybody was told to end (as a batch system does), when it has had time to save.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.host import job_dir, resources
from cluster.worker import ipc
from cluster.worker.fork_server_client import ORPHAN_CHECK_S, ORPHAN_S
from cluster.worker.messages import StartOrder
from train.errors import ExitCode
from train.util import streams
from train.util.reading import UNREADABLE, reason

LIFELINE = 0
"""Standard input: it ends when the owner does."""
SPARE_AFTER_S = 0.2
"""How long it has nothing to do before it forks its spare, which no worker shall wait for."""
SPARE_NAME = "spare"
"""Name of the spare's process, as ps shows it."""


class CudaCheck(Protocol):
    """A check of this host's devices that runs beside the imports, see ``cuda_probe.CudaProbe``."""

    def failure(self) -> str:
        """Why no worker can use a device of this host, in words; empty where they can."""


@dataclass
class ForkedWorker:
    """A forked worker and the connection to the agent that asked for it."""

    pid: int
    agent: socket.socket
    gpus: tuple[str, ...] = ()
    stop_grace: float = ORPHAN_S
    """Seconds that it may live without its agent once everybody was told to end."""
    orphaned: float | None = None
    """When its agent was lost (monotonic)."""


class ForkServer:
    """Forks workers for agents until its owner is gone.

    Only ``import_early``, ``import_target`` and ``run_worker`` know what a worker is; the rest loads no torch.
    """

    def __init__(self, listener: socket.socket, target: str, probe: CudaCheck | None = None) -> None:
        """``probe``: of this host's CUDA, where the workers are to use GPUs."""
        self.target, self.probe = target, probe
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.workers: dict[int, ForkedWorker] = {}
        self.held_back: list[tuple[socket.socket, StartOrder, list[int]]] = []
        """Orders for GPUs whose last workers have not ended yet."""
        self.failure: str | None = None
        """Why the imports failed; sent to each agent that asks for a worker."""
        self.stop_signalled = False
        self.spare = 0
        """Process id of the spare; 0 while there is none."""
        self.ready = 0.0
        """When the imports were done, in seconds since 1970."""

    @staticmethod
    def import_early() -> None:
        """Imports what workers need on any device, while the owner finds out on which they will run."""
        import torch._dynamo  # noqa: F401  the first optimizer imports it: 1.5 s that belong before the fork

        import cluster.worker.worker_main  # noqa: F401

    def import_target(self) -> None:
        """Imports the target and all that its module imports; keeps an error for the agents that will ask."""
        try:
            from cluster.worker import cuda_probe, worker_main

            with cuda_probe.answer_without_cuda(resources.count_gpus() if self.probe else 0):
                worker_main.load_target(self.target)
        except Exception:
            self.failure = traceback.format_exc()
        # The imports live as long as the process: out of the collector's sight, their pages stay shared.
        gc.collect()
        gc.freeze()
        self.ready = time.time()

    def run_worker(self, order: StartOrder, fds: list[int]) -> int:
        """Runs one rank in the process that was forked for it, and returns its exit status."""
        from cluster.worker import worker_main

        return worker_main.worker_main(order, fds)

    def serve(self) -> None:
        """Answers agents and reports workers' deaths until the owner closes standard input."""
        while self._serve_until_end():
            pass  # this process was the spare, and the one that forked it is dead

    def _serve_until_end(self) -> bool:
        """False once the owner is gone; True in the spare, when the fork server that forked it has ended."""
        awake, wake = socket.socketpair()
        awake.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # Ending is the owner's business: after a signal to everybody the workers still have to save.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_stop_signal)
        for source in (self.listener, awake, LIFELINE):
            self.selector.register(source, selectors.EVENT_READ)
        while True:
            orphans = self._kill_orphans()
            ready = self.selector.select(orphans if self.spare or orphans else SPARE_AFTER_S)
            if not ready and not self.spare and self._fork_spare():
                return True
            for key, _ in ready:
                if key.fileobj is self.listener:
                    self._accept_agent()
                elif key.fileobj is awake:
                    awake.recv(4096)
                    self._reap_workers()
                    self._start_held_back()
                elif key.fileobj == LIFELINE:
                    return False
                else:
                    self._serve_agent(key.fileobj)  # type: ignore[arg-type]

    def _note_stop_signal(self, number: int, frame: object) -> None:
        self.stop_signalled = True

    def _kill_orphans(self) -> float | None:
        """Kills workers that have been without an agent for too long; the seconds to the next check, if any."""
        orphans = [(worker, worker.orphaned) for worker in self.workers.values() if worker.orphaned is not None]
        for worker, since in orphans:
            if time.monotonic() > since + (worker.stop_grace if self.stop_signalled else ORPHAN_S):
                os.kill(worker.pid, signal.SIGKILL)
        return ORPHAN_CHECK_S if orphans else None

    def _accept_agent(self) -> None:
        agent, _ = self.listener.accept()
        self.selector.register(agent, selectors.EVENT_READ)

    def _serve_agent(self, agent: socket.socket) -> None:
        """Handles one message of an agent, which is an order to start a worker, or the end of its connection."""
        message, fds = ipc.receive(agent, max_fds=3)
        if message is None:
            self.selector.unregister(agent)
            agent.close()
            for worker in self.workers.values():
                if worker.agent is agent:
                    worker.orphaned = time.monotonic()
        elif self.failure:
            ipc.send(agent, {"failed": self.failure})
        elif self.probe is not None and (refused := self.probe.failure()):
            ipc.send(agent, {"refused": refused})
        else:
            try:
                order = StartOrder.from_json(message)
            except UNREADABLE as error:
                ipc.send(agent, {"failed": f"the order to start a worker cannot be read: {reason(error)}"})
            else:
                self._start_or_hold_back(agent, order, fds)

    def _start_or_hold_back(self, agent: socket.socket, order: StartOrder, fds: list[int]) -> None:
        """Forks the worker, once its GPU is free: a process that was killed may take long to give its memory back."""
        if any(set(order.gpus) & set(worker.gpus) for worker in self.workers.values()):
            self.held_back.append((agent, order, fds))
        else:
            self._fork_worker(agent, order, fds)

    def _start_held_back(self) -> None:
        """Tries those again that were held back; leaves out those whose agents are gone."""
        held_back, self.held_back = self.held_back, []
        for agent, order, fds in held_back:
            if agent.fileno() >= 0:
                self._start_or_hold_back(agent, order, fds)
            else:
                for fd in fds:
                    os.close(fd)

    def _fork_worker(self, agent: socket.socket, order: StartOrder, fds: list[int]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(parent, order, fds)
        for fd in fds:
            os.close(fd)
        self.workers[pid] = ForkedWorker(pid, agent, order.gpus, order.stop_grace)
        ipc.send(agent, {"pid": pid, "ready": self.ready})

    def _become_worker(self, parent: int, order: StartOrder, fds: list[int]) -> None:
        """In the child: closes the fork server's files, runs the rank, ends without the parent's exit handlers."""
        code: int = ExitCode.FAILURE
        try:
            ipc.die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for key in list(self.selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self.selector.close()
            code = self.run_worker(order, fds)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _fork_spare(self) -> bool:
        """Forks the spare. In the spare it returns True, once this process is dead: the spare then serves agents."""
        parent = os.getpid()
        self.spare = os.fork()
        if self.spare:
            return False
        signal.set_wakeup_fd(-1)
        shown = Path("/proc/self/comm")
        name = shown.read_text("utf-8").strip()
        shown.write_text(SPARE_NAME, encoding="utf-8")
        for key in list(self.selector.get_map().values()):  # else an agent would not see that this process died
            if isinstance(key.fileobj, socket.socket) and key.fileobj is not self.listener:
                key.fileobj.close()
        self.selector.close()
        for _, _, fds in self.held_back:
            for fd in fds:
                os.close(fd)
        ipc.wait_for_parents_end(parent)
        shown.write_text(name, encoding="utf-8")
        self.selector = selectors.DefaultSelector()
        self.workers, self.held_back = {}, []  # the workers died with their parent
        if self.probe is not None:
            self.probe = type(self.probe)()  # whose process has died too
        return True

    def _reap_workers(self) -> None:
        """Reports every worker that ended to its agent: exit code or signal, and its peak memory."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.spare:
                self.spare = 0
            worker = self.workers.pop(pid, None)
            if worker is not None and worker.agent.fileno() >= 0:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):  # the agent is gone too; its own end is reported by Ray
                    ipc.send(worker.agent, {"exit": code, "pid": pid, "peak_kib": usage.ru_maxrss})


def probe_cuda() -> CudaCheck:
    """Starts a check of whether CUDA can be used on this host."""
    from cluster.worker.cuda_probe import CudaProbe

    return CudaProbe()


def main(server_class: type[ForkServer] = ForkServer) -> None:
    """Reads the device from the first line of standard input, as soon as the owner knows it, and serves."""
    target, fd = sys.argv[1], int(sys.argv[2])
    listener = socket.socket(fileno=fd)
    resources.raise_file_limit()
    server_class.import_early()
    device = sys.stdin.readline().strip()
    if device:
        # Named, so that DeepSpeed does not probe for an accelerator, which would start CUDA and spoil the fork.
        os.environ["DS_ACCELERATOR"] = "cuda" if device == "gpu" else "cpu"
        server = server_class(listener, target, probe_cuda() if device == "gpu" else None)
        server.import_target()
        server.serve()
    if job_dir.JOB_ENV in os.environ:
        job_dir.end_job(os.environ[job_dir.JOB_ENV])


if __name__ == "__main__":
    streams.guard_log()
    main()
