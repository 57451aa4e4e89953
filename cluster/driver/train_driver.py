"""The driver of one job: configuration, corpus, Ray cluster, placement, supervision, exit code.

Importing torch and DeepSpeed takes longest, so the fork server does it (``cluster.driver.early_start``) while the
driver composes the configuration, which fails within a second if it is wrong, and then connects to Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cluster.driver import prepared_corpus
from cluster.driver.driver import Driver
from cluster.driver.early_start import EarlyStart
from cluster.host import run_lock
from cluster.raycluster import connect, placement, status
from cluster.raycluster.local_cluster import LocalRayCluster
from cluster.supervision import outcome
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.supervisor import Supervisor
from cluster.worker import worker_env
from train.config import load as configuration
from train.config.schema import Config
from train.errors import ExitCode
from train.events import JobEvent, NoteEvent, PhaseEvent
from train.reporting.console import RunConsole
from train.run_dir import resume
from train.run_dir.mixture_stages import settle_mixture
from train.util.format import plural
from train.util.io import FileLock


def plan_workers(
    config: Config, nodes: Sequence[placement.Node]
) -> tuple[Config, str, placement.WorkerRequest, placement.Placement]:
    """The configuration with its workers counted, their device, what they ask for, and how these nodes take them.

    UserError where the nodes cannot, or where the settings do not go with so many workers.
    """
    cluster = config.cluster
    device = placement.choose_device(cluster.device, nodes)
    config = configuration.with_workers(config, placement.default_workers(nodes, device, cluster.cpus_per_worker))
    request = placement.WorkerRequest(
        config.cluster.worker_count, cluster.cpus_per_worker, int(device == "gpu"), cluster.min_workers
    )
    return config, device, request, placement.place_workers(nodes, request)


class TrainDriver(Driver):
    """Runs the job of one command line: exit code 0 done, 75 stopped on request, 2 bad input, 1 a failure."""

    supervisor_class: type[Supervisor] = Supervisor

    def __init__(self, overrides: Sequence[str], early: EarlyStart) -> None:
        super().__init__(early)
        self.overrides = overrides
        self.console: RunConsole = RunConsole()
        self.signals = early.signals
        self.clock = StartupClock(early.since)
        self.run_dir = Path()
        self.lock: FileLock | None = None
        """Held on the run's folder for as long as this driver lives."""
        self.local_cluster: LocalRayCluster | None = None

    def load_config(self) -> Config:
        """The configuration that the command line asks for."""
        return configuration.load(self.overrides)

    def nodes_before_start(self, config: Config) -> list[placement.Node] | None:
        """The nodes that the job will have, where they are known before Ray has started."""
        return connect.nodes_before_start(config.cluster)

    def find_corpus(self, config: Config) -> str:
        """The folder of the prepared corpus; see ``prepared_corpus.find_corpus``."""
        return prepared_corpus.find_corpus(config, self.console.show)

    def remove_empty_folder(self) -> None:
        """After bad input: removes the run's folder where this command made it and nothing else has come into it."""
        if self.lock is not None:
            run_lock.remove_empty_run_dir(self.run_dir)

    def run(self) -> int:
        """Runs the job to its verdict, or finds that the run has made all its steps already."""
        clock = self.clock
        clock.mark("driver")
        config = self.load_config()
        clock.mark("config")
        self.run_dir = Path(config.run.dir or ".").absolute()
        self.lock = run_lock.lock_run_dir(self.run_dir)
        self.signals.on_exit.append(lambda: run_lock.remove_empty_run_dir(self.run_dir))
        if self._is_complete(config):
            return ExitCode.OK
        if (known := self.nodes_before_start(config)) is not None:
            plan_workers(config, known)  # what does not fit is told before text is read and Ray started
        corpus = self.find_corpus(config)
        config = settle_mixture(config, corpus, self._note)
        if self._is_complete(config):  # a mixture may end before its steps do
            return ExitCode.OK
        clock.mark("corpus")
        self.connect_to_ray(config)
        nodes = status.living_nodes()
        workers_left_out = config.cluster.workers is None
        config, device, request, packed = plan_workers(config, nodes)
        self.early.fork_server.set_device(device)
        if workers_left_out and device == "gpu":
            text = placement.describe_held_gpus(nodes, config.cluster.worker_count, status.job_holdings())
            if text:
                self._note(text)
        if packed.waiting:
            held = "; ".join(map(str, status.job_holdings()))
            self._note(f"waiting: no room yet for {plural(packed.waiting, 'worker')}: {held}")
        self.console.show(JobEvent(config.model_dump(by_alias=True), device, len(nodes)).to_json())
        if forwarded := worker_env.describe_forwarded(os.environ):
            self._note(forwarded)
        self.console.show(PhaseEvent("workers").to_json())
        folder = self.early.folder.name
        stop, signals = self.signals.stop, self.signals
        job = Job(
            config, corpus, self.early.target, folder, self._show, stop, clock, self.local_cluster, signals=signals
        )
        verdict = self.supervisor_class(job, device, placement.initial_workers(packed, request)).run()
        return self._finish(verdict, config)

    def connect_to_ray(self, config: Config) -> None:
        """Makes this process a driver of the configured Ray cluster, or of one that it starts for this job."""
        self.console.show(PhaseEvent("ray").to_json())
        self.local_cluster, self.remote_nodes = connect.connect(
            config.cluster, config.run.name or "", self.early.folder, self.early.target
        )
        self.signals.install()
        self.clock.mark("ray")

    def _is_complete(self, config: Config) -> bool:
        """Whether the run has made all its steps already; then its summary is shown."""
        if summary := resume.finished_summary(config):
            self.console.complete(config, summary)
        return summary is not None

    def _note(self, text: str) -> None:
        self.console.show(NoteEvent(text).to_json())

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
            self.console.show_bad_input(verdict.cause.error or "")
            return ExitCode.BAD_INPUT
        return ExitCode.FAILURE
