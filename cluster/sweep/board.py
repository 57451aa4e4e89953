"""How a sweep looks on the terminal: a table that lives, or, where nobody watches, a line an event."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.sweep.trial import Trial, short
from train.config.sweep_dir import ENDED
from train.events import FailureEvent
from train.reporting import failure_block
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
AROUND = 8
"""Lines of a terminal that the table's rows leave to its frame and its foot."""
WIDE, GAP, LEAST = 200, 3, 4
"""Characters: of a line where there is no terminal; between two columns of the table; of a line of a column's name, at least."""


class Board:
    """Shows the trials of one sweep. ``look`` says which there are."""

    def __init__(self, terminal: Terminal | None = None, errors: Terminal | None = None) -> None:
        self.terminal = terminal or Terminal(
            highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE
        )
        self.errors = errors or Terminal(stderr=True, highlight=False, soft_wrap=True)
        self.metrics: tuple[str, ...] = ()
        self.total: int | None = None
        self.best: Callable[[], list[Trial]] = list
        self.trials: Callable[[], Sequence[Trial]] = list
        self.foot = ""
        self._live: Live | None = None
        self._preparing: str | None = None

    def open(self) -> None:
        """From here on the table is up to date by itself, where there is a terminal."""
        if self.terminal.is_terminal and self._live is None:
            self._live = Live(
                get_renderable=self._all, console=self.terminal, transient=True, refresh_per_second=REFRESH_PER_S
            )
            self._live.start()

    def close(self) -> None:
        """Takes the live table away and gives the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # what happens

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.terminal.print(Text(text, style=style), soft_wrap=not self.terminal.is_terminal)

    def prepare(self, event: dict[str, Any]) -> None:
        """A step of the corpus' preparation."""
        words = PREPARING.get(event.get("phase", ""))
        if words is not None and words != self._preparing:
            self._preparing = words
            self.say(f"  preparing the corpus: {words}", "dim")

    def started(self, trial: Trial, workers: int, hosts: Sequence[str]) -> None:
        """A trial's places are taken."""
        if self._live is None:
            self.say(f"  {trial.words}: starts, {plural(workers, 'worker')} on {', '.join(dict.fromkeys(hosts))}")

    def measured(self, trial: Trial, event: dict[str, Any]) -> None:
        """A trial has evaluated."""
        found = [f"{metric} {event[metric]:.5g}" for metric in self.metrics if finite(event.get(metric))]
        if self._live is None and found:
            self.say(f"  {trial.words}: step {event['step']:,}/{trial.config.steps:,}  {'  '.join(found)}", "dim")

    def failed(self, trial: Trial, event: dict[str, Any]) -> None:
        """A world of a trial has failed: at once, and all of it."""
        lines = [
            f"{trial.words}: {event['lines'][0]}" if event.get("lines") else trial.words,
            *event.get("lines", [])[1:],
        ]
        failure = FailureEvent(lines, event.get("next"), again=True)
        self._out().print(failure_block.render_failure(failure, trial.config.run.dir, self.errors.is_terminal))

    def ended(self, trial: Trial) -> None:
        """A trial has ended."""
        values = "  ".join(f"{m} {v:.5g}" for m, v in zip(self.metrics, trial.values or [], strict=False))
        why = f": {trial.why}" if trial.why else ""
        best = "  (the best so far)" if trial.values and self.best() == [trial] else ""
        line = f"  {trial.words}: {trial.state} at step {trial.step:,}{why}  {values}{best}".rstrip()
        if trial.state in ("failed", "diverged"):
            self._out().print(Text(line, style=COLORS[trial.state]))
        else:
            self.say(line, "" if trial.state == "done" else "yellow")

    def _out(self) -> Terminal:
        """For errors: a live table owns the terminal, so they have to pass above it."""
        return self.errors if self._live is None else self.terminal

    def bad_input(self, message: str) -> None:
        """What is wrong with the input, where, and the cure."""
        self.close()
        self.errors.print(Text.assemble(("error: ", "bold red"), message))

    # how it stands

    def final(self) -> None:
        """The whole table, for good."""
        self.close()
        self.terminal.print(self.table(self.trials()), soft_wrap=False)

    def _all(self) -> RenderableType:
        trials, room = list(self.trials()), max(4, self.terminal.height - AROUND)
        if len(trials) > room:  # what moves first, then the best, then what ended last
            best = self.best()
            trials.sort(key=lambda t: (t.state in ENDED, t not in best, -t.number if t.state in ENDED else t.number))
            trials = sorted(trials[:room], key=lambda t: t.number)
        return Group(self.table(trials), Text(f"  {self.counts()}", style="dim"), Text(f"  {self.foot}", style="dim"))

    def counts(self) -> str:
        """How many trials are how far, and when all will be done."""
        states = [trial.state for trial in self.trials()]
        total = f" of {self.total}" if self.total is not None else ""
        facts = [f"{plural(sum(s in ENDED for s in states), 'trial')}{total} ended"]
        facts += [f"{states.count(s)} {s}" for s in ("running", "failed", "diverged", "pruned") if states.count(s)]
        left = self._left()
        return " · ".join([*facts, *([f"{duration(left)} left"] if left else [])])

    def _left(self) -> float | None:
        """Seconds to the end of the sweep, by the pace of the trials that run: all others are taken to make all their steps."""
        trials = list(self.trials())
        running = [t for t in trials if t.state not in (*ENDED, "queued") and t.pace and t.step > t.pace[0]]
        now = time.monotonic()
        speed = sum((t.step - t.pace[0]) / (now - t.pace[1]) for t in running if t.pace)
        steps = trials[0].config.steps if trials else 0
        waiting = (self.total or len(trials)) - len(trials)
        todo = sum(t.config.steps - t.step for t in trials if t.state not in ENDED) + waiting * steps
        return todo / speed if speed and todo else None

    def table(self, trials: Sequence[Trial]) -> Table:
        """Trials, what differs between them, and how they do. Where room is short the names of columns fold, and numbers do not."""
        keys, best = list(dict.fromkeys(key for trial in self.trials() for key in trial.params)), self.best()
        rows = [self._cells(trial, keys, " *" if trial in best else "") for trial in trials]
        columns = {
            name: [row[i] for row in rows]
            for i, name in enumerate(["trial", *keys, "state", "step", *self.metrics, "left"])
        }
        if not any(columns["left"]):
            del columns["left"]
        widest = {name: max(map(len, cells), default=0) for name, cells in columns.items()}
        line = longest_line(widest, self.terminal.width - GAP * len(columns) - 1)
        found = Table(title_justify="left", header_style="bold")
        for name in columns:
            heading = "\n".join(wrap(name, max(widest[name], line)))
            right = name in ("trial", "step", "left", *self.metrics)
            found.add_column(heading, justify="right" if right else "left", no_wrap=name not in keys, overflow="fold")
        for trial, *cells in zip(trials, *columns.values(), strict=True):
            styled = [
                Text(cell, COLORS.get(cell, "") if name == "state" else "")
                for name, cell in zip(columns, cells, strict=True)
            ]
            found.add_row(*styled, style="bold" if trial in best else "")
        return found

    def _cells(self, trial: Trial, keys: Sequence[str], mark: str) -> list[str]:
        left = trial.seconds_left() if trial.state not in ENDED else None
        return [
            str(trial.number),
            *(short(trial.params.get(key, "")) for key in keys),
            trial.state,
            f"{trial.step:,}/{trial.config.steps:,}",
            *(f"{value:.5g}{mark}" if value is not None else "" for value in self._values(trial)),
            duration(left) if left is not None else "",
        ]

    def _values(self, trial: Trial) -> list[float | None]:
        return list(trial.values) if trial.values else [trial.seen.get(metric) for metric in self.metrics]


def longest_line(widest: dict[str, int], room: int) -> int:
    """The most characters of a line of a column's name with which all columns fit in ``room``; ``widest``: those of their cells."""
    lines = range(max(map(len, widest)), LEAST, -1)
    return next(
        (n for n in lines if sum(max(cells, min(len(name), n)) for name, cells in widest.items()) <= room), LEAST
    )
