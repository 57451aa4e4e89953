"""Schedules the trials of a sweep: as many at once as the cluster has room for, the others in a queue.

A trial starts with all its workers or waits (see ``slot_pool``). The events of all trials come in through one queue to
one thread, which alone decides what runs next, what ends early and what is tried again.
"""

from __future__ import annotations

import collections
import queue
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.driver.prepared_corpus import find_corpus
from cluster.host import run_lock
from cluster.host.stop_request import StopRequest
from cluster.raycluster import placement
from cluster.supervision import slots
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.slots import Slot
from cluster.sweep.board import Board
from cluster.sweep.ledger import SweepLedger, TrialRecord
from cluster.sweep.search import TrialSearch, refuse_useless_values
from cluster.sweep.slot_pool import SlotPool, SweepResources
from cluster.sweep.trial import (
    Trial,
    TrialJob,
    best_trials,
    failed_from_outside,
    final_metrics,
    metric_history,
)
from train.config import load as configuration
from train.config.schema import Config
from train.config.sweep_dir import ENDED, FINAL
from train.config.sweep_space import SweepSpace
from train.errors import UserError
from train.run_dir import resume
from train.run_dir.mixture_stages import settle_mixture
from train.util.io import FileLock

EVENTS_S = 0.2
"""How long the scheduler waits for events at a time."""


class SweepScheduler:
    """The trials of one sweep, from what its ledger knows to the end of the last one."""

    def __init__(self, sweep: SweepSpace, ledger: SweepLedger, search: TrialSearch | None, board: Board) -> None:
        """Takes over what the ledger knows. UserError where a trial's configuration makes no sense."""
        self.sweep, self.ledger, self.search, self.board = sweep, ledger, search, board
        self.trials = [self._restore(number, record) for number, record in sorted(ledger.trials.items())]
        self.waiting = collections.deque(trial for trial in self.trials if trial.state == "queued")
        self.running: dict[int, TrialJob] = {}
        self.locks: dict[int, FileLock] = {}
        self.events: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        """(number of a trial, event of its job)."""
        self.stopping = False
        self.pruning: set[int] = set()
        self.nodes: Sequence[placement.Node] = ()
        """Of the cluster, once they are known."""
        board.metrics, board.trials, board.best = sweep.metrics, lambda: self.trials, self.best
        board.total = sweep.settings.trials if search else len(self.trials)

    def _restore(self, number: int, record: TrialRecord) -> Trial:
        """A trial of the ledger as it stands now, which the search is told of as well."""
        trial = Trial(number, record.params, configuration.load_trial(self.sweep, number, record.params))
        summary = resume.finished_summary(trial.config)
        if self.search:
            self.search.restore(record.params, record.attrs, metric_history(trial.folder, self.sweep.metrics[0]))
        if record.state in FINAL:
            trial.state, trial.step, trial.values, trial.why = record.state, record.step, record.values, record.why
        elif summary is not None:  # its driver was killed before it could write that into the ledger
            trial.state, trial.step = "done", summary["step"]
            trial.values = final_metrics(trial.folder, self.sweep.metrics)
            self._write_end(trial)
        if self.search and trial.state in FINAL:
            self.search.record_end(number, trial.state, trial.values)
        return trial

    def has_more(self) -> bool:
        """Whether there are trials left to start: in the queue, or within the search's number and budget."""
        if self.waiting or self.search is None:
            return bool(self.waiting)
        settings, steps = self.sweep.settings, self.sweep.base.steps
        spent = sum(trial.step if trial.state in ENDED else trial.config.steps for trial in self.trials)
        return len(self.trials) < settings.trials and (settings.budget is None or spent + steps <= settings.budget)

    def best(self) -> list[Trial]:
        """The best finished trials; see ``trial.best_trials``."""
        return best_trials(self.trials, self.sweep.directions)

    # -------------------------------------------------------------------------------------------------- starting trials

    def run(self, resources: SweepResources) -> None:
        """Runs the trials that are left, until all have ended, or a signal came and all are saved.

        UserError where a trial can never fit on the cluster.
        """
        self.resources, self.pool = resources, SlotPool(resources, self.board)
        if not self.nodes:
            self.check_trials(resources.nodes)
        for config in [trial.config for trial in self.waiting] or [self.sweep.base]:
            each, gpus = config.cluster.cpus_per_worker, int(resources.device == "gpu")
            placement.place_workers(resources.nodes, placement.WorkerRequest(config.cluster.worker_count, each, gpus))
        resources.signals.training_began()
        while self.running or (self.has_more() and not self.stopping):
            if resources.signals.stop.signal is not None and not self.stopping:
                self._stop_all(resources.signals.stop.signal)
            if not self.stopping:
                self._start_trials()
            self._handle_events()
        self.pool.release_all()

    def check_trials(self, nodes: Sequence[placement.Node]) -> None:
        """Counts the workers of all trials on these nodes, where that was left out.

        UserError where they do not fit to the rest of a trial's configuration, or a value of a search to any.
        """
        self.nodes = nodes
        self.sweep = replace(self.sweep, base=self._with_workers(self.sweep.base))
        for trial in self.waiting:
            trial.config = self._with_workers(trial.config)
        if self.search is not None:
            refuse_useless_values(self.sweep, self._with_workers)

    def _with_workers(self, config: Config) -> Config:
        """The configuration of a trial with its number of workers, where that was left out."""
        device = placement.choose_device(config.cluster.device, self.nodes)
        workers = placement.default_workers(self.nodes, device, config.cluster.cpus_per_worker)
        return configuration.with_workers(config, workers)

    def _stop_all(self, number: int) -> None:
        self.stopping = True
        what = f"{', '.join(f'trial {n}' for n in self.running) or 'nothing'} has to finish a step and save"
        self.board.print_line(f"  stopping: {what} (once more to end at once)", "yellow")
        for job in self.running.values():
            job.request_stop(number)

    def _start_trials(self) -> None:
        """Starts trials for as long as the slots of all their workers are there."""
        if self.resources.lost() and not self.running:
            self.pool.restart_cluster()
        most = self.sweep.settings.parallel
        while self.has_more() and not self.resources.lost() and (most is None or len(self.running) < most):
            cluster = (self.waiting[0].config if self.waiting else self.sweep.base).cluster
            gang = self.pool.take_gang(cluster, [job.job.config.cluster.worker_count for job in self.running.values()])
            if not gang:
                return
            self._start_next(gang)
        if not self.has_more():
            self.pool.release_all()

    def _next_trial(self) -> Trial | None:
        """The first trial that waits, or one that the search suggests; None where its configuration makes no sense."""
        if self.waiting:
            return self.waiting.popleft()
        assert self.search is not None
        number, params, attrs = self.search.suggest()
        self.ledger.record_trial(number, params, attrs)
        trial = Trial(number, params, self.sweep.base)
        self.trials.append(trial)
        try:
            trial.config = self._with_workers(configuration.load_trial(self.sweep, number, params))
        except UserError as error:
            self._end_trial(trial, "failed", str(error))
            return None
        return trial

    def _start_next(self, gang: list[Slot]) -> None:
        """Starts the next trial in the slots of ``gang``, or returns them where it cannot start."""
        trial = self._next_trial()
        if trial is None:
            self.pool.return_gang(gang)
            return
        try:
            self.locks[trial.number] = run_lock.lock_run_dir(trial.folder)
            corpus = find_corpus(trial.config, self.board.show_preparing)
            trial.config = settle_mixture(trial.config, corpus, lambda text: None)
        except UserError as error:
            self._end_trial(trial, "failed", str(error))
            self.pool.return_gang(gang)
            return
        resources = self.resources
        stop, clock = StopRequest(), StartupClock(time.time())
        trial.state, trial.first_heard = "starting", None

        def show(event: dict[str, Any]) -> None:
            self.events.put((trial.number, event))

        hosts = slots.gang_hosts(gang)
        self.ledger.record_start(trial.number, len(hosts), hosts)
        self.board.show_started(trial, len(hosts), hosts)
        target, folder, local_cluster = resources.target, resources.folder, resources.local_cluster
        job = Job(trial.config, corpus, target, folder, show, stop, clock, local_cluster)
        self.running[trial.number] = TrialJob(job, resources.device, gang, show, self.pool.left)

    # -------------------------------------------------------------------------------------------------- handling events

    def _handle_events(self) -> None:
        """Handles all events that have arrived, after waiting a moment for the first."""
        wait = EVENTS_S
        while True:
            try:
                number, event = self.events.get(timeout=wait)
            except queue.Empty:
                return
            wait = 0.0
            trial, job = self.trials[number], self.running[number]
            if event["event"] == "ended":
                self._on_job_ended(trial, event)
            else:
                trial.update(event)
                self._on_event(trial, job, event)

    def _on_event(self, trial: Trial, job: TrialJob, event: dict[str, Any]) -> None:
        kind = event["event"]
        job.job.clock.first_step(event, trial.folder)
        if kind == "failure":
            job.why = (event.get("lines") or [""])[0]
            self.board.show_failure(trial, event)
        elif kind == "note":
            self.board.print_line(f"  {trial.title}: {event['text']}", "yellow")
        elif kind == "plan" and event.get("start_step"):
            self.board.print_line(
                f"  {trial.title}: goes on from its checkpoint of step {event['start_step']:,}", "dim"
            )
        elif kind == "eval":
            self.board.show_metrics(trial, event)
        value = event.get(self.sweep.metrics[0]) if kind in ("eval", "step") else None
        if value is None or self.search is None or event["step"] >= trial.config.steps:
            return
        if self.search.report(trial.number, event["step"], value) and trial.number not in self.pruning:
            self.pruning.add(trial.number)
            job.request_stop(signal.SIGTERM)

    def _on_job_ended(self, trial: Trial, event: dict[str, Any]) -> None:
        """All processes of a trial's job have ended: decides what that means for the trial."""
        job, verdict = self.running.pop(trial.number), event["verdict"]
        if event["lost"]:  # the ledger has it as cut off, which it is
            trial.state = "queued"
            self.waiting.appendleft(trial)
            self.locks.pop(trial.number).close()
            return
        self.pool.restarts = 0
        self.pool.leave(job.left)
        self.pool.return_gang(job.reusable_slots)
        why = event["why"] or job.why
        if verdict.kind == "done":
            self._end_trial(trial, "done", "")
        elif verdict.kind == "stopped" and (trial.number in self.pruning or self.stopping):
            self._end_trial(trial, "pruned" if trial.number in self.pruning else "stopped", "")
        else:
            why = why or "it was told to end from outside"
            from_outside = verdict.kind == "stopped" or failed_from_outside(verdict)
            retry = from_outside and trial.tries < self.sweep.settings.retries and not self.stopping
            self._end_trial(trial, "diverged" if verdict.fault == "not finite" else "failed", why, retry)

    def _end_trial(self, trial: Trial, state: str, why: str, retry: bool = False) -> None:
        """Records how a trial has ended; with ``retry`` it goes to the end of the queue."""
        trial.state, trial.why = state, why
        if state == "done":
            trial.step, trial.values = trial.config.steps, final_metrics(trial.folder, self.sweep.metrics)
        elif state == "pruned":
            history = metric_history(trial.folder, self.sweep.metrics[0])
            trial.values = [history[-1][1]] if history else None
        if lock := self.locks.pop(trial.number, None):
            lock.close()
        self._write_end(trial)
        self.board.show_end(trial)
        if retry:
            trial.state, trial.tries = "queued", trial.tries + 1
            self.waiting.append(trial)
            self.board.print_line(
                f"  {trial.title}: will be tried again (sweep.retries={self.sweep.settings.retries})", "yellow"
            )
        elif self.search is not None and state != "stopped":
            self.search.record_end(trial.number, state, trial.values)

    def _write_end(self, trial: Trial) -> None:
        facts = {"state": trial.state, "step": trial.step, "values": trial.values, "why": trial.why}
        self.ledger.record_end(trial.number, facts)
