"""Rendering of failures and recoveries on the terminal. Imports no torch."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from train.events import FailureEvent, RecoveredEvent
from train.printable import printable

PHASES = {
    "ended": "noticed and ended",
    "start": "workers started",
    "connected": "met",
    "engine": "data",
    "first_step": "engine and checkpoint",
    "train": "first step",
}
"""Marks of a recovery, in order, and the part of it that is done by then."""


def render_failure(event: FailureEvent, run_dir: str | None, terminal: bool) -> RenderableType:
    """The block of a failure: its lines, the folder of the logs, and the driver's next action."""
    lines = [printable(line) for line in event.lines or ["the job failed"]]  # as wide as they are shown
    title, body = lines[0], "\n".join(lines[1:])
    same = "" if event.again else "run the same command again to go on from the newest checkpoint"
    then = "; ".join(words for words in (event.next, same) if words)
    if terminal:
        text = Text.assemble((title, "bold red"), *(["\n", body] if body else []))
        shown: list[RenderableType] = [Panel(text, title="failed", title_align="left", border_style="red")]
    else:
        indented = "\n".join(f"  {line}".rstrip() for line in body.splitlines())
        shown = [Text(f"FAILED: {title}" + (f"\n{indented}" if body else ""))]
    logs = f"{run_dir or 'the run folder'}/logs/"
    return Group(*shown, Text(f"The ranks' logs: {logs}"), Text(f"Next: {then}"))


def render_recovery(event: RecoveredEvent) -> Text:
    """One line: the seconds from the failure to the next step of all ranks, and when each phase was done."""
    marks = event.marks
    since = marks.get("failed")
    if since is None or "train" not in marks:
        return Text("  recovered")
    facts = [f"{word} {marks[key] - since:.1f}" for key, word in PHASES.items() if key in marks]
    return Text(f"  recovered in {marks['train'] - since:.1f} s with {event.workers} workers: " + " · ".join(facts))
