"""``train -m``: from a command line with several values to a sweep's exit code."""

from __future__ import annotations

import contextlib
import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from cluster.driver import driver
from cluster.driver.early_start import EarlyStart
from cluster.host import run_lock
from cluster.raycluster import connect, placement, ray_node, remote_hosts
from cluster.sweep.board import Board
from cluster.sweep.ledger import SweepLedger
from cluster.sweep.scheduler import Chooser, SweepScheduler
from cluster.sweep.slot_pool import FindCorpus, SweepResources
from train.config import load as configuration
from train.config import sweep_space
from train.config.sweep_dir import LOCK, RESULTS
from train.config.sweep_space import SweepSpace
from train.errors import ExitCode
from train.util.format import plural
from train.util.io import FileLock, write_whole

BAD = ("failed", "diverged")


def run(overrides: Sequence[str], find_corpus: FindCorpus, begun: EarlyStart) -> int:
    """Runs a sweep and returns the exit code: 0 all trials are done, 75 stopped on request, 2 bad input, 1 one has failed."""
    return driver.carry_out(SweepDriver(overrides, find_corpus, begun), begun)


class SweepDriver:
    """The driver of one sweep."""

    def __init__(self, overrides: Sequence[str], find_corpus: FindCorpus, begun: EarlyStart) -> None:
        self.overrides, self.find_corpus, self.begun = overrides, find_corpus, begun
        self.console = Board()
        self.others: remote_hosts.RemoteNodes | None = None
        self.held: FileLock | None = None
        self.folder = Path()

    def remove_empty_run_dir(self) -> None:
        """After bad input: leaves no empty folder behind."""
        with contextlib.suppress(OSError):
            if self.held is not None and [path.name for path in self.folder.iterdir()] == [LOCK]:
                (self.folder / LOCK).unlink()
                self.folder.rmdir()

    def go(self) -> int:
        """Everything up to the verdict."""
        sweep = configuration.load_sweep(self.overrides)
        self.folder = Path(sweep.settings.dir or ".").absolute()
        self.held = run_lock.lock_file(self.folder / LOCK, "sweep.dir")
        queue = open_sweep(sweep, self.folder, self.console)
        self.console.say(f"Trireme sweep {sweep.settings.name}", "bold")
        self.console.say(f"  sweep    {sweep.settings.dir}: {_what(queue)}")
        if queue.more():
            base = sweep.base.cluster
            private, self.others = connect.connect(
                base, f"sweep {sweep.settings.name}", self.begun.folder, self.begun.target
            )
            self.begun.signals.install()
            device = placement.choose_device(base.device, ray_node.inventory())
            self.begun.fork_server.set_device(device)
            self.console.open()
            begun = self.begun
            queue.run(SweepResources(device, begun.target, begun.folder.name, begun.signals, self.find_corpus, private))
        return self._finish(queue)

    def _finish(self, queue: SweepScheduler) -> int:
        write_whole(self.folder / RESULTS, results(queue).encode())
        out, where = self.console, queue.sweep.settings.dir
        out.final()
        best = queue.best()
        if best:
            out.say(f"  best     {'; '.join(trial.words for trial in best)}", "bold")
        code = verdict(queue)
        if code == ExitCode.STOPPED:
            out.say("Stopped and saved. Run the same command again to go on:", "bold yellow")
            out.say(f"  ./launch.sh train -m {shlex.join(self.overrides)}")
            return code
        bad = [trial for trial in queue.trials if trial.state in BAD]
        for trial in bad:
            out.say(
                f"  {trial.words}: {trial.state}: {trial.why.strip().splitlines()[0] if trial.why else 'its logs say more'}",
                "red",
            )
        out.say(f"  next     ./launch.sh review {where}")
        if bad:
            out.say(
                f"  {plural(len(bad), 'trial')} failed: the same command tries those again that did not diverge", "red"
            )
        return code


def open_sweep(sweep: SweepSpace, folder: Path, board: Board) -> SweepScheduler:
    """The trials of a sweep as its folder has them, which is begun where it is new. UserError where it is another sweep's."""
    if sweep.settings.sampler == "grid":
        return SweepScheduler(sweep, SweepLedger(folder, sweep, sweep_space.grid(sweep)), None, board)
    from cluster.sweep.search import TrialSearch  # only now: Optuna is for searches

    search: Chooser = TrialSearch(sweep)
    return SweepScheduler(sweep, SweepLedger(folder, sweep, None), search, board)


def verdict(queue: SweepScheduler) -> int:
    """The exit code of a sweep that has ended."""
    if queue.stopping:
        return ExitCode.STOPPED
    return ExitCode.FAILURE if any(trial.state in BAD for trial in queue.trials) else ExitCode.OK


def results(queue: SweepScheduler) -> str:
    """The table of a sweep for other programs: what each trial's values were and what came of it."""
    keys = queue.sweep.keys
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["trial", *keys, "state", "step", *queue.sweep.metrics])
    for trial in queue.trials:
        values: list[float] | list[str] = trial.values or [""] * len(queue.sweep.metrics)
        table.writerow([trial.number, *(trial.params.get(key, "") for key in keys), trial.state, trial.step, *values])
    return out.getvalue()


def _what(queue: SweepScheduler) -> str:
    """What there is to do, in words."""
    ended = sum(trial.state != "queued" for trial in queue.trials)
    total = plural(queue.board.total, "trial")
    found = f"{total}, {queue.sweep.settings.sampler}, of {', '.join(queue.sweep.keys)}"
    return found + (f"; {ended} {'is' if ended == 1 else 'are'} done already" if ended else "")
