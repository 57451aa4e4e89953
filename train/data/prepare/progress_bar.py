"""Preparing a corpus with progress shown: a bar on a terminal, one line a phase elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from train.config import schema
from train.data.corpus.shards import Corpus, describe_corpus
from train.data.prepare.prepare import prepare
from train.util.format import PREPARING, plural


def prepare_with_progress(data: schema.DataConfig, console: Console, objective: schema.Objective | None = None) -> Path:
    """Call ``prepare`` and show its progress on ``console``, then a summary of the corpus; returns its folder."""
    columns = (TextColumn("{task.description:22}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    last: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(event: dict[str, Any]) -> None:
            last.update(event)
            phase = event["phase"]
            if phase == "wait":
                bars.print(f"another prepare works on {event['folder']}: waiting for it")
            if event.get("note"):
                bars.console.print(event["note"], markup=False)
            if phase not in PREPARING:
                return
            if phase not in tasks:
                tasks[phase] = bars.add_task(PREPARING[phase], total=event["total"])
                if not console.is_terminal:
                    console.print(PREPARING[phase])
                if event.get("kept"):
                    bars.print(f"{event['kept']} of {event['shards']} shards were finished before, and are kept")
            bars.update(tasks[phase], completed=event["done"])

        folder = prepare(data, show, objective)
    if not last["new"]:
        console.print(f"{folder} is prepared and current: nothing to do")
    for name, split in describe_corpus(Corpus(folder))["splits"].items():
        parts = (f"{split['tokens']:,} tokens", f"{split['bytes']:,} bytes of text", plural(split["shards"], "shard"))
        console.print(f"  {name:5} {plural(split['samples'], 'document')}, {', '.join(parts)}")
    console.print(f"  in {folder}")
    return folder
