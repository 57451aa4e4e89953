"""The warm process of a host: it imports torch, DeepSpeed and our code once, and forks the trainers of the host's
ranks.

    python -m cluster.worker.fork_server TARGET LISTENING_FD       (started by ``cluster.host.WarmProcess``)

A fork of it reaches its first step in a fraction of a second, where a fresh interpreter pays seconds of imports on
every start, for every rank. It never touches CUDA and starts no thread, for neither survives a fork. It sees its
children's deaths at once and reports them with their signal and peak memory.

Lifetime: its standard input is a pipe that its owner holds open. When the owner is gone, by any means, it ends, and the
kernel kills its trainers with it. When the steward that asked for a trainer is gone, that trainer is killed: at once, or,
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

import torch._dynamo  # noqa: F401  the first optimizer imports it: 1.5 s that belong before the fork

from cluster.host import job_dir
from cluster.worker import ipc, worker_main
from train.errors import ExitCode
from train.util import redact

LIFELINE = 0
"""Standard input: it ends when the owner does."""
ORPHAN_S = 1.0
"""How long a trainer outlives its steward: a signal to everybody reaches us soon after it has ended the steward."""
SAVE_S = 60.0
"""How long after such a signal, when the trainers are saving what they have."""


@dataclass
class ForkedWorker:
    """A forked trainer and the steward that hears of it."""

    pid: int
    agent: socket.socket
    orphaned: float | None = None
    """When its steward was lost (monotonic)."""


class ForkServer:
    """Serves stewards until its owner is gone."""

    def __init__(self, listener: socket.socket, target: str) -> None:
        self.target = target
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, ForkedWorker] = {}
        self.failure: str | None = None
        self.told_to_stop = False
        self.ready = 0.0

    def load(self) -> None:
        """Imports the target, and whatever its module wants loaded before the fork (its ``preload``, if it has one)."""
        try:
            module = sys.modules[worker_main.load_target(self.target).__module__]
            if hasattr(module, "preload"):
                module.preload()
        except Exception:
            self.failure = traceback.format_exc()
        # What is loaded now lives as long as the process: out of the collector's sight, its pages stay shared.
        gc.collect()
        gc.freeze()
        self.ready = time.time()

    def serve(self) -> None:
        """Answers stewards and reports deaths until the owner closes standard input."""
        awake, wake = socket.socketpair()
        awake.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # Ending is the owner's business: after a signal to everybody the trainers still have to save.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._told)
        for source in (self.listener, awake, LIFELINE):
            self.selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select(self._kill_orphans()):
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fileobj is awake:
                    awake.recv(4096)
                    self._reap()
                elif key.fileobj == LIFELINE:
                    return
                else:
                    self._hear(key.fileobj)  # type: ignore[arg-type]

    def _told(self, number: int, frame: object) -> None:
        self.told_to_stop = True

    def _kill_orphans(self) -> float | None:
        """Kills the trainers whose time without a steward is over; the seconds until this is to be asked again."""
        orphans = [(child, child.orphaned) for child in self.children.values() if child.orphaned is not None]
        for child, since in orphans:
            if time.monotonic() > since + (SAVE_S if self.told_to_stop else ORPHAN_S):
                os.kill(child.pid, signal.SIGKILL)
        return 0.1 if orphans else None

    def _accept(self) -> None:
        steward, _ = self.listener.accept()
        self.selector.register(steward, selectors.EVENT_READ)

    def _hear(self, steward: socket.socket) -> None:
        """One message of a steward: the request for a trainer; or its end."""
        message, fds = ipc.receive(steward, max_fds=3)
        if message is None:
            self.selector.unregister(steward)
            steward.close()
            for child in self.children.values():
                if child.agent is steward:
                    child.orphaned = time.monotonic()
        elif self.failure:
            ipc.send(steward, {"failed": self.failure})
        else:
            self._fork(steward, message, fds)

    def _fork(self, steward: socket.socket, request: ipc.Message, fds: list[int]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_trainer(parent, request, fds)
        for fd in fds:
            os.close(fd)
        self.children[pid] = ForkedWorker(pid, steward)
        ipc.send(steward, {"pid": pid, "ready": self.ready})

    def _become_trainer(self, parent: int, request: ipc.Message, fds: list[int]) -> None:
        """In the child: lets go of what is the warm process's, runs the rank, and ends without the parent's exit
        handlers.
        """
        code: int = ExitCode.FAILURE
        try:
            ipc.die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for key in list(self.selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self.selector.close()
            code = worker_main.worker_main(request, fds)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _reap(self) -> None:
        """Reports every trainer that ended: exit code or signal, and the most memory it held."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child is not None and child.agent.fileno() >= 0:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):  # the steward is gone too; its own end is reported by Ray
                    ipc.send(child.agent, {"exit": code, "pid": pid, "peak_kib": usage.ru_maxrss})


def main() -> None:
    """Reads the device from the first line of standard input, as soon as the owner knows it, and serves."""
    target, fd = sys.argv[1], int(sys.argv[2])
    warm = ForkServer(socket.socket(fileno=fd), target)
    device = sys.stdin.readline().strip()
    if device:
        # Named, so that DeepSpeed does not probe for an accelerator, which would start CUDA and spoil the fork.
        os.environ["DS_ACCELERATOR"] = "cuda" if device == "gpu" else "cpu"
        warm.load()
        warm.serve()
    if job_dir.MARK in os.environ:
        job_dir.end_job(os.environ[job_dir.MARK])


if __name__ == "__main__":
    redact.redact_output()
    main()
