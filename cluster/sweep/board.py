"""Shows a sweep: a live table on a terminal, or one line per event in a file."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.sweep.trial import Trial, shorten
from train.config.sweep_dir import ENDED
from train.events import FailureEvent
from train.printable import printable
from train.reporting import failure_block
from train.reporting.terminal import UserConsole
from train.util.format import PREPARING, duration, finite, plural

REFRESH_PER_S = 4
COLORS = {
    "done": "green",
    "pruned": "dim",
    "diverged": "red",
    "failed": "bold red",
    "stopped": "yellow",
    "running": "cyan",
}
FRAME_LINES = 8
"""Lines of a terminal that the table's rows leave to its frame and its footer."""
FILE_WIDTH = 200
"""Characters of a line where there is no terminal."""
COLUMN_GAP = 3
"""Characters between two columns of the table."""
LEAST_LINE = 4
"""Characters of a line of a folded column name, at least."""


class Board:
    """Shows the trials of one sweep. The scheduler sets ``metrics``, ``trials``, ``best``, ``total`` and ``footer``."""

    def __init__(self, terminal: UserConsole | None = None, errors: UserConsole | None = None) -> None:
        self.terminal = terminal or UserConsole(width=None if sys.stdout.isatty() else FILE_WIDTH)
        self.errors = errors or UserConsole(stderr=True)
        self.metrics: tuple[str, ...] = ()
        self.total: int | None = None
        self.best: Callable[[], list[Trial]] = list
        self.trials: Callable[[], Sequence[Trial]] = list
        self.footer = ""
        self._live: Live | None = None
        self._preparing: str | None = None

    def open(self) -> None:
        """Starts the live table, where there is a terminal."""
        if self.terminal.is_live and self._live is None:
            self._live = Live(
                get_renderable=self._render, console=self.terminal, transient=True, refresh_per_second=REFRESH_PER_S
            )
            self._live.start()

    def close(self) -> None:
        """Removes the live table and gives the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # ----------------------------------------------------------------------------------------------------------- events

    def print_line(self, text: str, style: str = "") -> None:
        """Prints a line that stays, above the live table."""
        self.terminal.print(Text(text, style=style), soft_wrap=not self.terminal.is_live)

    def show_preparing(self, event: dict[str, Any]) -> None:
        """Shows a phase of the corpus' preparation, once, and its notes."""
        if event.get("note"):
            self.print_line(f"  {event['note']}", "dim")
        words = PREPARING.get(event.get("phase", ""))
        if words is not None and words != self._preparing:
            self._preparing = words
            self.print_line(f"  preparing the corpus: {words}", "dim")

    def show_started(self, trial: Trial, workers: int, hosts: Sequence[str]) -> None:
        """Shows that a trial starts: its workers have their slots, on ``hosts``."""
        if self._live is None:
            self.print_line(
                f"  {trial.title}: starts, {plural(workers, 'worker')} on {', '.join(dict.fromkeys(hosts))}"
            )

    def show_metrics(self, trial: Trial, event: dict[str, Any]) -> None:
        """Shows the metrics of a trial's evaluation."""
        values = [f"{metric} {event[metric]:.5g}" for metric in self.metrics if finite(event.get(metric))]
        if self._live is None and values:
            step = f"step {event['step']:,}/{trial.config.steps:,}"
            self.print_line(f"  {trial.title}: {step}  {'  '.join(values)}", "dim")

    def show_failure(self, trial: Trial, event: dict[str, Any]) -> None:
        """Shows all that is known of a trial's failure, at once."""
        lines = [
            f"{trial.title}: {event['lines'][0]}" if event.get("lines") else trial.title,
            *event.get("lines", [])[1:],
        ]
        failure = FailureEvent(lines, event.get("next"), again=True)
        terminal = self.errors.is_live
        self._error_terminal().print(failure_block.render_failure(failure, trial.config.run.dir, terminal))

    def show_end(self, trial: Trial) -> None:
        """Shows how a trial has ended."""
        values = "  ".join(f"{m} {v:.5g}" for m, v in zip(self.metrics, trial.values or [], strict=False))
        why = f": {trial.why}" if trial.why else ""
        best = "  (the best so far)" if trial.values and self.best() == [trial] else ""
        line = f"  {trial.title}: {trial.state} at step {trial.step:,}{why}  {values}{best}".rstrip()
        if trial.state in ("failed", "diverged"):
            self._error_terminal().print(Text(line, style=COLORS[trial.state]))
        else:
            self.print_line(line, "" if trial.state == "done" else "yellow")

    def _error_terminal(self) -> UserConsole:
        """Where errors go: above the live table, which owns the terminal, or else to standard error."""
        return self.errors if self._live is None else self.terminal

    def show_bad_input(self, message: str) -> None:
        """Shows what is wrong with the input and how to correct it."""
        self.close()
        self.errors.print(Text.assemble(("error: ", "bold red"), message))

    # ------------------------------------------------------------------------------------------------------------ table

    def print_table(self) -> None:
        """Ends the live display and prints the whole table."""
        self.close()
        self.terminal.print(self.table(self.trials()), soft_wrap=False)

    def _render(self) -> RenderableType:
        trials, room = list(self.trials()), max(4, self.terminal.height - FRAME_LINES)
        if len(trials) > room:  # running ones first, then the best, then those that ended last
            best = self.best()
            trials.sort(key=lambda t: (t.state in ENDED, t not in best, -t.number if t.state in ENDED else t.number))
            trials = sorted(trials[:room], key=lambda t: t.number)
        return Group(self.table(trials), Text(f"  {self.counts()}", style="dim"), Text(f"  {self.footer}", style="dim"))

    def counts(self) -> str:
        """How many trials are in which state, and the estimated time to the end of the sweep, in words."""
        states = [trial.state for trial in self.trials()]
        total = f" of {self.total}" if self.total is not None else ""
        facts = [f"{plural(sum(s in ENDED for s in states), 'trial')}{total} ended"]
        facts += [f"{states.count(s)} {s}" for s in ("running", "failed", "diverged", "pruned") if states.count(s)]
        left = self._seconds_left()
        return " · ".join([*facts, *([f"{duration(left)} left"] if left else [])])

    def _seconds_left(self) -> float | None:
        """Estimated seconds to the end of the sweep, by the pace of the trials that run.

        All others are assumed to make all their steps. None where nothing is known yet.
        """
        trials = list(self.trials())
        now, speed = time.monotonic(), 0.0
        for trial in trials:
            if trial.first_heard is not None and trial.state not in (*ENDED, "queued"):
                step, moment = trial.first_heard
                speed += (trial.step - step) / (now - moment) if trial.step > step else 0.0
        steps = trials[0].config.steps if trials else 0
        waiting = (self.total or len(trials)) - len(trials)
        todo = sum(t.config.steps - t.step for t in trials if t.state not in ENDED) + waiting * steps
        return todo / speed if speed and todo else None

    def table(self, trials: Sequence[Trial]) -> Table:
        """The table of trials: their values, states, steps and metrics.

        On a narrow terminal the names of columns are folded, and numbers never are.
        """
        keys = list(dict.fromkeys(itertools.chain.from_iterable(trial.params for trial in self.trials())))
        best = self.best()
        rows = [self._cells(trial, keys, " *" if trial in best else "") for trial in trials]
        names = ["trial", *keys, "state", "step", *self.metrics, "left"]
        columns = {}
        for n, name in enumerate(names):
            columns[name] = [row[n] for row in rows]
        if not any(columns["left"]):
            del columns["left"]
        widest = {name: max(map(len, cells), default=0) for name, cells in columns.items()}
        line = longest_line(widest, self.terminal.width - COLUMN_GAP * len(columns) - 1)
        table = Table(title_justify="left", header_style="bold")
        for name in columns:
            heading = "\n".join(wrap(name, max(widest[name], line)))
            right = name in ("trial", "step", "left", *self.metrics)
            table.add_column(heading, justify="right" if right else "left", no_wrap=name not in keys, overflow="fold")
        for trial, *cells in zip(trials, *columns.values(), strict=True):
            styled = [
                Text(cell, COLORS.get(cell, "") if name == "state" else "")
                for name, cell in zip(columns, cells, strict=True)
            ]
            table.add_row(*styled, style="bold" if trial in best else "")
        return table

    def _cells(self, trial: Trial, keys: Sequence[str], mark: str) -> list[str]:
        left = trial.seconds_left() if trial.state not in ENDED else None
        return [
            str(trial.number),
            *(printable(shorten(trial.params.get(key, ""))) for key in keys),
            trial.state,
            f"{trial.step:,}/{trial.config.steps:,}",
            *(f"{value:.5g}{mark}" if value is not None else "" for value in self._values(trial)),
            duration(left) if left is not None else "",
        ]

    def _values(self, trial: Trial) -> list[float | None]:
        return list(trial.values) if trial.values else [trial.latest.get(metric) for metric in self.metrics]


def longest_line(widest: dict[str, int], room: int) -> int:
    """The most characters of a line to which column names may be folded so that all columns fit in ``room``.

    ``widest``: name of a column -> characters of its widest cell.
    """
    for line in range(max(map(len, widest)), LEAST_LINE, -1):
        widths = [max(cells, min(len(name), line)) for name, cells in widest.items()]
        if sum(widths) <= room:
            return line
    return LEAST_LINE
