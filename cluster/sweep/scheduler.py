"""The trials of a sweep, from the first to the last: as many at once as the cluster has room for, the others in a queue.

Places are taken by the gang: a trial starts with all its workers or waits. What the trials say comes in through one queue to one
thread, which alone decides: what runs next, what ends early, what is tried again.
"""

from __future__ import annotations

import collections
import queue
import signal
import time
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.host import run_lock
from cluster.host.stop_request import StopRequest
from cluster.raycluster import placement, ray_node
from cluster.supervision import slots
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.slots import Slot
from cluster.sweep.board import Board
from cluster.sweep.ledger import SweepLedger, TrialRecord
from cluster.sweep.slot_pool import SlotPool, SweepResources
from cluster.sweep.trial import Shared, Trial, TrialJob, best, final, from_outside, history
from train.config import load as configuration
from train.config.sweep_dir import ENDED, FINAL
from train.config.sweep_space import Params, SweepSpace
from train.errors import UserError
from train.run_dir import resume
from train.util.io import FileLock

HEAR_S = 0.2


class Chooser(Protocol):
    """What a search knows and does: see ``search.Search``."""

    def suggest(self) -> tuple[int, Params, dict[str, Any]]:
        """The next trial."""

    def know(self, params: Params, attrs: dict[str, Any], reports: Sequence[tuple[int, float]]) -> None:
        """Takes over the next trial of an earlier driver."""

    def report(self, number: int, step: int, value: float) -> bool:
        """Takes a metric at a step; whether the trial should end."""

    def tell(self, number: int, state: str, values: Sequence[float] | None) -> None:
        """How a trial has ended."""


class SweepScheduler:
    """One sweep's trials."""

    def __init__(self, sweep: SweepSpace, ledger: SweepLedger, search: Chooser | None, board: Board) -> None:
        """What the ledger knows is taken over. UserError where a trial's configuration makes no sense."""
        self.sweep, self.ledger, self.search, self.board = sweep, ledger, search, board
        self.trials = [self._known(number, entry) for number, entry in sorted(ledger.trials.items())]
        self.waiting = collections.deque(trial for trial in self.trials if trial.state == "queued")
        self.running: dict[int, TrialJob] = {}
        self.locks: dict[int, FileLock] = {}
        self.news: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self.stopping = False
        self.pruning: set[int] = set()
        board.metrics, board.trials, board.best = sweep.metrics, lambda: self.trials, self.best
        board.total = sweep.settings.trials if search else len(self.trials)

    def _known(self, number: int, entry: TrialRecord) -> Trial:
        """A trial of the ledger as it stands now."""
        trial = Trial(number, entry.params, configuration.load_trial(self.sweep, number, entry.params))
        summary = resume.finished_summary(trial.config)
        if self.search:
            self.search.know(entry.params, entry.attrs, history(trial.folder, self.sweep.metrics[0]))
        if entry.state in FINAL:
            trial.state, trial.step, trial.values, trial.why = entry.state, entry.step, entry.values, entry.why
        elif summary is not None:  # its driver was killed before it could note it
            trial.state, trial.step, trial.values = "done", summary["step"], final(trial.folder, self.sweep.metrics)
            self._note(trial)
        if self.search and trial.state in FINAL:
            self.search.tell(number, trial.state, trial.values)
        return trial

    def more(self) -> bool:
        """Whether there are trials to start."""
        if self.waiting or self.search is None:
            return bool(self.waiting)
        settings, steps = self.sweep.settings, self.sweep.base.steps
        spent = sum(trial.step if trial.state in ENDED else trial.config.steps for trial in self.trials)
        return len(self.trials) < settings.trials and (settings.budget is None or spent + steps <= settings.budget)

    def best(self) -> list[Trial]:
        """See ``trial.best``."""
        return best(self.trials, self.sweep.directions)

    # ---------------------------------------------------------------------------------------------------------- running

    def run(self, ground: SweepResources) -> None:
        """Runs what is left, until all has ended or a signal came and all is saved. UserError where a trial can never fit."""
        self.ground, self.places = ground, SlotPool(ground, self.board)
        known = ray_node.inventory()
        for trial in [*self.waiting] or [Trial(-1, {}, self.sweep.base)]:
            cluster = trial.config.cluster
            placement.place_workers(
                known, placement.WorkerRequest(cluster.workers, cluster.cpus_per_worker, int(ground.device == "gpu"))
            )
        ground.signals.training_began()
        while self.running or (self.more() and not self.stopping):
            if ground.signals.stop.signal is not None and not self.stopping:
                self._stop(ground.signals.stop.signal)
            if not self.stopping:
                self._admit()
            self._hear()
        self.places.give_up()

    def _stop(self, number: int) -> None:
        self.stopping = True
        what = f"{', '.join(f'trial {n}' for n in self.running) or 'nothing'} has to finish a step and save"
        self.board.say(f"  stopping: {what} (once more to end at once)", "yellow")
        for running in self.running.values():
            running.stop(number)

    def _admit(self) -> None:
        """Starts trials for as long as there is room for their gangs."""
        if self.ground.lost() and not self.running:
            self.places.rebuild()
        most = self.sweep.settings.parallel
        while self.more() and not self.ground.lost() and (most is None or len(self.running) < most):
            cluster = (self.waiting[0].config if self.waiting else self.sweep.base).cluster
            gang = self.places.take(cluster, len(self.running))
            if not gang:
                return
            self._start(gang)
        if not self.more():
            self.places.give_up()

    def _next(self) -> Trial | None:
        """The next trial: the first that waits, or one that the search suggests. None where that makes no sense."""
        if self.waiting:
            return self.waiting.popleft()
        assert self.search is not None
        number, params, attrs = self.search.suggest()
        self.ledger.add(number, params, attrs)
        trial = Trial(number, params, self.sweep.base)
        self.trials.append(trial)
        try:
            trial.config = configuration.load_trial(self.sweep, number, params)
        except UserError as error:
            self._settle(trial, "failed", str(error))
            return None
        return trial

    def _start(self, gang: list[Slot]) -> None:
        """Starts the next trial in a gang's places."""
        trial = self._next()
        if trial is None:
            self.places.leave(gang)
            return
        try:
            self.locks[trial.number] = run_lock.lock_run_dir(trial.folder)
            corpus = self.ground.find_corpus(trial.config, self.board.prepare)
        except UserError as error:
            self._settle(trial, "failed", str(error))
            self.places.leave(gang)
            return
        private = Shared(self.ground.private) if self.ground.private is not None else None
        stop, clock = StopRequest(), StartupClock(time.time())
        trial.state, trial.pace = "starting", None

        def show(event: dict[str, Any]) -> None:
            self.news.put((trial.number, event))

        hosts = slots.gang_hosts(gang)
        self.ledger.start(trial.number, len(hosts), hosts)
        self.board.started(trial, len(hosts), hosts)
        job = Job(trial.config, corpus, self.ground.target, self.ground.folder, show, stop, clock, private)
        self.running[trial.number] = TrialJob(job, self.ground.device, gang, show)

    # ---------------------------------------------------------------------------------------------------------- hearing

    def _hear(self) -> None:
        """Takes what the trials have said by now, after a moment's wait."""
        wait = HEAR_S
        while True:
            try:
                number, event = self.news.get(timeout=wait)
            except queue.Empty:
                return
            wait = 0.0
            trial, running = self.trials[number], self.running[number]
            if event["event"] == "ended":
                self._ended(trial, event)
            else:
                trial.hear(event)
                self._tell(trial, running, event)

    def _tell(self, trial: Trial, running: TrialJob, event: dict[str, Any]) -> None:
        kind = event["event"]
        running.job.clock.first_step(event, trial.folder)
        if kind == "failure":
            running.why = (event.get("lines") or [""])[0]
            self.board.failed(trial, event)
        elif kind == "note":
            self.board.say(f"  {trial.words}: {event['text']}", "yellow")
        elif kind == "plan" and event.get("start_step"):
            self.board.say(f"  {trial.words}: goes on from its checkpoint of step {event['start_step']:,}", "dim")
        elif kind == "eval":
            self.board.measured(trial, event)
        value = event.get(self.sweep.metrics[0]) if kind in ("eval", "step") else None
        if value is None or self.search is None or event["step"] >= trial.config.steps:
            return
        if self.search.report(trial.number, event["step"], value) and trial.number not in self.pruning:
            self.pruning.add(trial.number)
            running.stop(signal.SIGTERM)

    def _ended(self, trial: Trial, event: dict[str, Any]) -> None:
        """All processes of a trial are gone: what that means for it."""
        running, verdict = self.running.pop(trial.number), event["verdict"]
        if event["lost"]:  # the ledger has it as cut off, which it is
            trial.state = "queued"
            self.waiting.appendleft(trial)
            self.locks.pop(trial.number).close()
            return
        self.places.rebuilt = 0
        self.places.leave(running.left)
        why = event["why"] or running.why
        if verdict.kind == "done":
            self._settle(trial, "done", "")
        elif verdict.kind == "stopped" and (trial.number in self.pruning or self.stopping):
            self._settle(trial, "pruned" if trial.number in self.pruning else "stopped", "")
        else:
            why = why or "it was told to end from outside"
            again = (verdict.kind == "stopped" or from_outside(verdict)) and trial.tries < self.sweep.settings.retries
            self._settle(
                trial, "diverged" if verdict.fault == "not finite" else "failed", why, again and not self.stopping
            )

    def _settle(self, trial: Trial, state: str, why: str, again: bool = False) -> None:
        """Notes how a trial has ended, and puts it back into the queue where it is to be tried ``again``."""
        trial.state, trial.why = state, why
        if state == "done":
            trial.step, trial.values = trial.config.steps, final(trial.folder, self.sweep.metrics)
        elif state == "pruned":
            trial.values = [value for _, value in history(trial.folder, self.sweep.metrics[0])[-1:]] or None
        if held := self.locks.pop(trial.number, None):
            held.close()
        self._note(trial)
        self.board.ended(trial)
        if again:
            trial.state, trial.tries = "queued", trial.tries + 1
            self.waiting.append(trial)
            self.board.say(
                f"  {trial.words}: will be tried again (sweep.retries={self.sweep.settings.retries})", "yellow"
            )
        elif self.search is not None and state != "stopped":
            self.search.tell(trial.number, state, trial.values)

    def _note(self, trial: Trial) -> None:
        facts = {"state": trial.state, "step": trial.step, "values": trial.values, "why": trial.why}
        self.ledger.end(trial.number, facts)
