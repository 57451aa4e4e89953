"""From a command line to a job's exit code.

Importing torch and DeepSpeed takes longest, so the warm process is at it already (``cluster.driver.early_start``) while the driver composes
the configuration, which fails within a second if it is wrong, and then brings up Ray.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.driver.early_start import EarlyStart
from cluster.host import run_lock
from cluster.host.stop_request import end_now
from cluster.raycluster import connect, ray_node, remote_hosts, status
from cluster.raycluster import placement as plan
from cluster.raycluster.local_cluster import LocalRayCluster
from cluster.supervision import outcome
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.supervisor import Supervisor
from train.config.schema import Config
from train.errors import NO_ROOM, ExitCode, UserError, no_room
from train.events import JobEvent, NoteEvent, PhaseEvent
from train.reporting.console import RunConsole
from train.util.format import plural
from train.util.io import FileLock


@dataclass(frozen=True)
class Plan:
    """What to run: how to get its configuration and its corpus, and whether it is done already."""

    compose: Callable[[], Config]
    find_corpus: Callable[[Config, Callable[[dict], None]], str]
    finished: Callable[[Config], dict | None] = lambda config: None
    """The summary of a run that has made all its steps already."""


class Voice(Protocol):
    """What speaks for a driver."""

    def close(self) -> None:
        """Gives the terminal back."""

    def bad_input(self, message: str) -> None:
        """Says what is wrong."""


class Command(Protocol):
    """What a driver does between its first moments and its last."""

    others: remote_hosts.RemoteNodes | None
    """Nodes on other hosts that end with it."""

    @property
    def console(self) -> Voice:
        """Who speaks for it."""

    def go(self) -> int:
        """All of it: the exit code."""

    def remove_empty_run_dir(self) -> None:
        """After bad input: leaves no empty folder behind."""


def run(what: Plan, begun: EarlyStart) -> int:
    """Runs a job and returns the exit code: 0 done, 75 stopped on request, 2 bad input, 1 a failure."""
    return carry_out(TrainDriver(what, begun), begun)


def carry_out(command: Command, begun: EarlyStart) -> int:
    """Runs a command to its exit code, and ends this process with it and all that it has started."""
    console = command.console
    begun.signals.on_exit.insert(0, console.close)
    try:
        code = command.go()
    except UserError as error:
        console.bad_input(str(error))
        code = ExitCode.BAD_INPUT
        command.remove_empty_run_dir()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            console.bad_input(no_room(error))
            code = ExitCode.BAD_INPUT
        else:  # the interpreter's own end would first let go of the warm process, which then ends all that is the job's
            console.close()
            traceback.print_exc()
            code = ExitCode.FAILURE
    finally:
        console.close()
    if command.others is not None:
        command.others.close()
    # The kernel takes Ray's processes and the trainers on this host away with this one: nothing to wait for.
    begun.clear()
    sys.stdout.flush()
    sys.stderr.flush()
    end_now(code)
    return code


class TrainDriver:
    """The start of one job, and its end."""

    def __init__(self, what: Plan, begun: EarlyStart) -> None:
        self.what = what
        self.begun = begun
        self.console = RunConsole()
        self.signals = begun.signals
        self.clock = StartupClock(begun.since)
        self.run_dir = Path()
        self.held: FileLock | None = None
        self.private: LocalRayCluster | None = None
        self.others: remote_hosts.RemoteNodes | None = None

    def remove_empty_run_dir(self) -> None:
        """After bad input: leaves no empty folder behind."""
        if self.held is not None:
            run_lock.remove_empty_run_dir(self.run_dir)

    def go(self) -> int:
        """Everything up to the verdict."""
        clock = self.clock
        clock.mark("driver")
        config = self.what.compose()
        clock.mark("config")
        self.run_dir = Path(config.run.dir or ".").absolute()
        self.held = run_lock.lock_run_dir(self.run_dir)
        self.signals.on_exit.append(lambda: run_lock.remove_empty_run_dir(self.run_dir))
        if summary := self.what.finished(config):
            self.console.complete(config, summary)
            return ExitCode.OK
        corpus = self.what.find_corpus(config, self.console.show)
        clock.mark("corpus")
        self._cluster(config)
        known = ray_node.inventory()
        device = plan.choose_device(config.cluster.device, known)
        self.begun.fork_server.set_device(device)
        cluster = config.cluster
        request = plan.WorkerRequest(
            cluster.workers, cluster.cpus_per_worker, int(device == "gpu"), cluster.min_workers
        )
        placement = plan.place_workers(known, request)
        if placement.waiting:
            held = "; ".join(map(str, status.holders()))
            self.console.show(
                NoteEvent(f"waiting: no room yet for {plural(placement.waiting, 'worker')}: {held}").to_json()
            )
        self.console.show(JobEvent(config.model_dump(by_alias=True), device, len(known)).to_json())
        self.console.show(PhaseEvent("workers").to_json())
        job = Job(
            config,
            corpus,
            self.begun.target,
            self.begun.folder.name,
            self._show,
            self.signals.stop,
            clock,
            self.private,
            self.signals,
        )
        verdict = Supervisor(job, device, plan.initial_workers(placement, request)).run()
        return self._finish(verdict, config)

    def _cluster(self, config: Config) -> None:
        """Has the driver on the cluster that the configuration names, or on one of the job's own."""
        self.console.show(PhaseEvent("ray").to_json())
        self.private, self.others = connect.connect(
            config.cluster, config.run.name or "", self.begun.folder, self.begun.target
        )
        self.signals.install()
        self.clock.mark("ray")

    def _show(self, event: dict) -> None:
        self.console.show(event)
        if self.clock.first_step(event, self.run_dir):
            self.console.startup(self.clock.marks)

    def _finish(self, verdict: outcome.Verdict, config: Config) -> int:
        if verdict.kind == "done":
            self.console.finished(config)
            return ExitCode.OK
        if verdict.kind == "stopped":
            self.console.stopped(config)
            return ExitCode.STOPPED
        if verdict.kind == "bad_input" and verdict.cause is not None:
            self.console.bad_input(verdict.cause.error or "")
            return ExitCode.BAD_INPUT
        return ExitCode.FAILURE
