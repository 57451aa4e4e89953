"""``train -m``: from a command line with several values to a sweep's exit code and results."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from cluster.driver.driver import Driver
from cluster.driver.early_start import EarlyStart
from cluster.host import run_lock
from cluster.raycluster import connect, placement, status
from cluster.sweep.board import Board
from cluster.sweep.ledger import SweepLedger
from cluster.sweep.scheduler import SweepScheduler
from cluster.sweep.search import TrialSearch
from cluster.sweep.slot_pool import SweepResources
from cluster.worker import worker_env
from train.config import load as configuration
from train.config import sweep_space
from train.config.sweep_dir import LOCK, RESULTS
from train.config.sweep_space import SweepSpace
from train.errors import ExitCode
from train.util.format import plural
from train.util.io import FileLock, write_whole

FAILED = ("failed", "diverged")


class SweepDriver(Driver):
    """Runs a sweep: exit code 0 all trials are done, 75 stopped on request, 2 bad input, 1 a trial has failed."""

    def __init__(self, overrides: Sequence[str], early: EarlyStart) -> None:
        super().__init__(early)
        self.overrides = overrides
        self.console: Board = Board()
        self.lock: FileLock | None = None
        """Held on the sweep's folder for as long as this driver lives."""
        self.folder = Path()

    def remove_empty_folder(self) -> None:
        """After bad input: removes the sweep's folder where there is nothing in it but the lock."""
        with contextlib.suppress(OSError):
            if self.lock is not None and [path.name for path in self.folder.iterdir()] == [LOCK]:
                (self.folder / LOCK).unlink()
                self.folder.rmdir()

    def run(self) -> int:
        """Runs the trials that are left, and writes the results."""
        sweep = configuration.load_sweep(self.overrides)
        self.folder = Path(sweep.settings.dir or ".").absolute()
        self.lock = run_lock.lock_file(self.folder / LOCK, "sweep.dir")
        scheduler = open_sweep(sweep, self.folder, self.console)
        self.console.print_line(f"Trireme sweep {sweep.settings.name}", "bold")
        self.console.print_line(f"  sweep    {sweep.settings.dir}: {_describe(scheduler)}")
        if scheduler.has_more():
            if (known := connect.nodes_before_start(sweep.base.cluster)) is not None:
                scheduler.check_trials(known)  # what makes no sense is told before Ray is started
            scheduler.run(self._connect_to_ray(sweep))
        return self._finish(scheduler)

    def _connect_to_ray(self, sweep: SweepSpace) -> SweepResources:
        """Makes this process a driver of the configured Ray cluster, or of one that it starts for the sweep."""
        early, cluster = self.early, sweep.base.cluster
        local_cluster, self.remote_nodes = connect.connect(
            cluster, f"sweep {sweep.settings.name}", early.folder, early.target, shared=True
        )
        early.signals.install()
        nodes = status.living_nodes()
        device = placement.choose_device(cluster.device, nodes)
        early.fork_server.set_device(device)
        if forwarded := worker_env.describe_forwarded(os.environ):
            self.console.print_line(f"  {forwarded}", "yellow")
        self.console.open()
        return SweepResources(device, nodes, early.target, early.folder.name, early.signals, local_cluster)

    def _finish(self, scheduler: SweepScheduler) -> int:
        write_whole(self.folder / RESULTS, results_csv(scheduler).encode())
        out, folder = self.console, scheduler.sweep.settings.dir
        out.print_table()
        best = scheduler.best()
        if best:
            out.print_line(f"  best     {'; '.join(trial.title for trial in best)}", "bold")
        code = exit_code(scheduler)
        if code == ExitCode.STOPPED:
            out.print_line("Stopped and saved. Run the same command again to go on:", "bold yellow")
            out.print_line(f"  ./launch.sh train -m {shlex.join(self.overrides)}")
            return code
        failed = [trial for trial in scheduler.trials if trial.state in FAILED]
        for trial in failed:
            reason = trial.why.strip().splitlines()[0] if trial.why else "its logs say more"
            out.print_line(f"  {trial.title}: {trial.state}: {reason}", "red")
        out.print_line(f"  next     ./launch.sh review {shlex.quote(str(folder))}")
        if failed:
            out.print_line(
                f"  {plural(len(failed), 'trial')} failed: the same command tries those again that did not diverge",
                "red",
            )
        return code


def open_sweep(sweep: SweepSpace, folder: Path, board: Board) -> SweepScheduler:
    """The scheduler of a sweep, new or as its folder's ledger has it. UserError where that is another sweep's."""
    if sweep.settings.sampler == "grid":
        return SweepScheduler(sweep, SweepLedger(folder, sweep, sweep_space.grid(sweep)), None, board)
    return SweepScheduler(sweep, SweepLedger(folder, sweep, None), TrialSearch(sweep), board)


def exit_code(scheduler: SweepScheduler) -> int:
    """The exit code of a sweep that has ended or was stopped."""
    if scheduler.stopping:
        return ExitCode.STOPPED
    return ExitCode.FAILURE if any(trial.state in FAILED for trial in scheduler.trials) else ExitCode.OK


def results_csv(scheduler: SweepScheduler) -> str:
    """The table of a sweep for other programs, as CSV: values, state, last step and metrics of each trial."""
    keys, metrics = scheduler.sweep.keys, scheduler.sweep.metrics
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["trial", *keys, "state", "step", *metrics])
    for trial in scheduler.trials:
        values: list[float] | list[str] = trial.values or [""] * len(metrics)
        table.writerow([trial.number, *(trial.params.get(key, "") for key in keys), trial.state, trial.step, *values])
    return out.getvalue()


def _describe(scheduler: SweepScheduler) -> str:
    """How many trials of which keys there are, and how many are done already, in words."""
    ended = sum(trial.state != "queued" for trial in scheduler.trials)
    total = plural(scheduler.board.total, "trial")
    text = f"{total}, {scheduler.sweep.settings.sampler}, of {', '.join(scheduler.sweep.keys)}"
    return text + (f"; {ended} {'is' if ended == 1 else 'are'} done already" if ended else "")
