"""Simulated workers for ``bench scale``: processes that speak the protocol of a rank and train nothing.

    python -m bench.tools.simulated_ranks TARGET LISTENING_FD      (started by ``SimulatedForkServerProcess``)

The product's own fork server forks them by the agents' orders. Each has a real heartbeat, event pipe, log and exit
status, dies by real signals, and works in step with the others. A job that holds a thousand on one machine has no
memory for torch: they sleep where a rank computes, and meet on a page of shared memory where it calls a collective.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import mmap
import os
import signal
import time
from pathlib import Path

from cluster.worker import fork_server, fork_server_client, ipc
from cluster.worker.messages import StartOrder
from train.distributed import heartbeat
from train.errors import ExitCode
from train.events import PhaseEvent, PlanEvent, StepEvent, StopAgreedEvent, StopAskedEvent
from train.util import streams
from train.util.io import write_whole

HANG, SLOW = signal.SIGRTMIN, signal.SIGRTMIN + 1
"""Signals that make a rank stand still for ever, and work more slowly or again as fast as the others."""
SLOW_FACTOR = 2.0
LOOK_S, COORDINATE_S = 0.25, 0.05
"""Between looks at the board: of a rank, and of rank 0, for which all wait."""
RELEASED, STOP_ASKED, STOP_AT, ARRIVED = range(4)
"""Places of the board: the newest step that all have made, two for a stop, and from ARRIVED on a place a rank."""


class Board:
    """A page of numbers that the ranks of one attempt share, in the place of a network."""

    def __init__(self, order: StartOrder) -> None:
        """Rank 0 makes it; the others wait for it."""
        path = Path(json.loads(order.corpus)["board"] + f".{order.rendezvous.attempt}")
        size = 8 * (ARRIVED + order.size)
        if order.rank == 0:
            partial = path.with_suffix(".partial")
            partial.write_bytes(bytes(size))
            partial.rename(path)
        while not path.exists():
            time.sleep(LOOK_S)
        with path.open("r+b") as file:
            self.numbers = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        self.rank = order.rank

    def meet(self, step: int) -> None:
        """Waits until all ranks are here; rank 0 sees to it."""
        self.numbers[ARRIVED + self.rank] = step
        if self.rank == 0:
            while min(self.numbers[ARRIVED:]) < step:
                time.sleep(COORDINATE_S)
            if self.numbers[STOP_ASKED] and not self.numbers[STOP_AT]:
                self.numbers[STOP_AT] = step
            self.numbers[RELEASED] = step
        while self.numbers[RELEASED] < step:
            time.sleep(LOOK_S)


class SimulatedRank:
    """One rank: it makes steps until it is told to end, hangs or is killed."""

    def __init__(self, order: StartOrder, fds: list[int]) -> None:
        self.order, self.settings = order, json.loads(order.corpus)
        events_fd, heartbeat_fd, *_ = fds
        heartbeat.attach(heartbeat_fd)
        self.events = ipc.EventPipe(events_fd)
        self.slow = False
        self.stopping = False
        signal.signal(HANG, lambda number, frame: self._hang())
        signal.signal(SLOW, lambda number, frame: setattr(self, "slow", not self.slow))
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "stopping", True))

    def _hang(self) -> None:
        while True:
            time.sleep(3600)

    def run(self) -> int:
        """Makes steps, from where the last attempt came to: the exit status."""
        self.events(PhaseEvent.now("start"))
        rank0 = self.order.rank == 0
        progress = Path(self.order.log).parents[1] / "progress"
        first = int(progress.read_text("utf-8")) + 1 if progress.exists() else 1
        board = Board(self.order)
        meet = heartbeat.count_calls(board.meet, "all_reduce_sum")
        board.meet(1)  # the rendezvous: a rank that waits in it has begun no collective
        self.events(PhaseEvent.now("connected"))
        if rank0:
            self.events(PlanEvent(params=1, tokens=1, steps=self.settings["steps"], start_step=first - 1))
        for number, step in enumerate(range(first, self.settings["steps"] + 1), 2):
            heartbeat.set_step(step)
            heartbeat.enter_phase("data")
            heartbeat.enter_phase("forward")
            time.sleep(self.settings["work_s"] * (SLOW_FACTOR if self.slow else 1.0))
            heartbeat.enter_phase("backward")
            if self.stopping and not board.numbers[STOP_ASKED]:
                board.numbers[STOP_ASKED] = 1
                self.events(StopAskedEvent(signal.SIGTERM))
            meet(number)
            heartbeat.enter_phase("step")
            if number == 2:
                self.events(PhaseEvent.now("train"))
            if rank0:
                write_whole(progress, str(step).encode())
                self.events(StepEvent(self.settings["steps"], step, {"loss": 1.0, "tokens_per_s": 1.0}))
            if board.numbers[STOP_AT] == number:
                self.events(StopAgreedEvent())
                return ExitCode.STOPPED
        return ExitCode.OK


class SimulatedForkServer(fork_server.ForkServer):
    """The product's fork server, with simulated ranks for workers."""

    @staticmethod
    def import_early() -> None:
        """Imports nothing: a simulated rank needs no more than the fork server itself."""

    def import_target(self) -> None:
        """Keeps what is there already out of the collector's sight, so that its pages stay shared."""
        gc.collect()
        gc.freeze()
        self.ready = time.time()

    def run_worker(self, order: StartOrder, fds: list[int]) -> int:
        """Runs one simulated rank, with its output in its own log."""
        log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(2)
        faulthandler.register(signal.SIGUSR1, 2)
        return SimulatedRank(order, fds).run()


class SimulatedForkServerProcess(fork_server_client.ForkServerProcess):
    """Owner of a fork server of simulated ranks."""

    MODULE = "bench.tools.simulated_ranks"


if __name__ == "__main__":
    streams.guard_log()
    fork_server.main(SimulatedForkServer)
