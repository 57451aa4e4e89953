"""A review as the comment of a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from review.importance import Importances
from review.run_differences import best, differing, noise, verdict, warnings
from review.run_reader import Run, sweeps_of
from review.scaling.study import Study, report
from train.util.format import count, duration

MOST_KEYS, MOST_RUNS, SHOWN = 8, 100, 12
"""Rows beyond SHOWN are folded away."""


def render(runs: Sequence[Run], found: Importances | None, study: Study | None) -> str:
    """A verdict, a table of runs with the keys that differ, the best run first; what mattered, what failed, and the scaling law."""
    keys, goal = differing(runs), runs[0].goal
    front = {id(run) for run in best(runs)}
    worth = {id(run): run.score if goal.least or run.score is None else -run.score for run in runs}
    order = sorted(
        runs, key=lambda run: (id(run) not in front, run.state != "done", worth[id(run)] is None, worth[id(run)] or 0.0)
    )
    lines = [f"**{cell(verdict(runs))}**", ""] + [f"{cell(sweep.words())}\n" for sweep in sweeps_of(runs)]
    lines += [f"> {cell(line)}\n" for line in warnings(runs)]
    goals = [goal.metric for goal in runs[0].goals]
    shown = keys[:MOST_KEYS]
    head = [row(["run", "state", *shown, *goals, "tokens", "time", "goodput"])]
    head.append(row(["---"] * (2 + len(shown)) + ["---:"] * (len(goals) + 3)))
    rows = [row(_cells(run, shown, id(run) in front)) for run in order[:MOST_RUNS]]
    lines += [*head, *rows[:SHOWN]]
    if rows[SHOWN:]:
        lines += [
            "",
            f"<details><summary>{len(rows) - SHOWN} more</summary>",
            "",
            *head,
            *rows[SHOWN:],
            "",
            "</details>",
        ]
    if len(order) > MOST_RUNS:
        lines.append(f"\n... and {len(order) - MOST_RUNS} more runs.")
    if len(keys) > MOST_KEYS:
        lines.append("\nAlso different: " + ", ".join(f"`{cell(key)}`" for key in keys[MOST_KEYS:]))
    if spread := noise(runs):
        lines.append(
            f"\nStandard deviation between seeds: {spread[0]:.4f} ({goal.unit}; {spread[1]} degrees of freedom)."
        )
    if found is not None:
        ranks = ", ".join(
            f"{cell(key.key)} {key.mean:.3g} ({key.low:.3g} to {key.high:.3g})" for key in found.keys[:MOST_KEYS]
        )
        trust = f"from {found.runs} runs, {max(found.explained, 0):.0%} of unseen runs' variance explained"
        weak = "" if found.explained > 0.3 else " That is too little to believe the order."
        lines.append(f"\nWhich keys mattered (error when shuffled, {goal.unit}; {trust}): {ranks}.{weak}")
    noted = [(run, [run.why, *run.notes]) for run in order if run.notes or (run.why and run.state != "pruned")][
        :MOST_RUNS
    ]
    lines += (
        ["", *(f"- {cell(run.name)} ({run.state}): {cell('; '.join(filter(None, said)))}" for run, said in noted)]
        if noted
        else []
    )
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


def _cells(run: Run, keys: Sequence[str], first: bool) -> list[str]:
    so_far = "" if run.state == "done" else " (so far)"
    facts = [
        *(
            ""
            if (value := run.measured(goal)) is None
            else f"{value:.4f}{so_far}"
            if abs(value) < 1e4
            else f"{value:.3g}{so_far}"
            for goal in run.goals
        ),
        "" if run.tokens is None else count(int(run.tokens)),
        "" if run.wall_s is None else duration(run.wall_s),
        "" if run.goodput is None else f"{run.goodput:.1%}",
    ]
    name = f"**{cell(run.name)}** (best)" if first else cell(run.name)
    return [name, run.state, *(cell(_short(run.value(key))) for key in keys), *facts]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
