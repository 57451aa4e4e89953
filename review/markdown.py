"""A review as the comment of a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from review.compare import differing, noise, verdict, warnings
from review.read import Run, number
from review.scaling import Study, report
from train.words import count, duration

MOST_KEYS, MOST_RUNS = 8, 40


def render(runs: Sequence[Run], study: Study | None) -> str:
    """A verdict, a table of runs with the keys that differ, the best run first, and the scaling law where there is one."""
    keys = differing(runs)
    order = sorted(runs, key=lambda run: (run.state != "done", run.val_loss is None, run.val_loss or 0.0))
    lines = [f"**{cell(verdict(runs))}**", ""] + [f"> {cell(line)}\n" for line in warnings(runs)]
    head = ["run", "state", *keys[:MOST_KEYS], "val_loss", "tokens", "time", "goodput"]
    lines += [row(head), row(["---"] * (2 + len(keys[:MOST_KEYS])) + ["---:"] * 4)]
    lines += [row(_cells(run, keys[:MOST_KEYS])) for run in order[:MOST_RUNS]]
    if len(order) > MOST_RUNS:
        lines.append(f"\n... and {len(order) - MOST_RUNS} more runs.")
    if len(keys) > MOST_KEYS:
        lines.append("\nAlso different: " + ", ".join(f"`{cell(key)}`" for key in keys[MOST_KEYS:]))
    if spread := noise(runs):
        lines.append(f"\nStandard deviation between seeds: {spread[0]:.4f} nats per token ({spread[1]} degrees of freedom).")
    noted = [run for run in order if run.notes][:MOST_RUNS]
    lines += ["", *(f"- {cell(run.name)}: {cell('; '.join(run.notes))}" for run in noted)] if noted else []
    if study is not None:
        lines += ["", "**Scaling law**", "", *(f"- {cell(line)}" for line in report(study))]
    return "\n".join(lines)


def cell(text: Any) -> str:
    """A text that stays inside its cell and makes no markup, no mention and no link."""
    short = " ".join(str(text).split())[:600]
    for sign in "\\`*_{}[]<>|#~":
        short = short.replace(sign, f"&#{ord(sign)};" if sign in "<>|`" else f"\\{sign}" if sign in "\\*[]~" else sign)
    return short.replace("@", "@\u200b").replace("://", ":&#47;&#47;")


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def _cells(run: Run, keys: Sequence[str]) -> list[str]:
    wall, goodput = number(run.summary.get("wall_s")), number(run.summary.get("goodput"))
    facts = [
        "" if run.val_loss is None else f"{run.val_loss:.4f}" + ("" if run.state == "done" else " (so far)"),
        "" if run.tokens is None else count(int(run.tokens)),
        "" if wall is None else duration(wall),
        "" if goodput is None else f"{goodput:.1%}",
    ]
    return [cell(run.name), run.state, *(cell(run.config.get(key, "")) for key in keys), *facts]
