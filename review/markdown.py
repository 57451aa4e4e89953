"""A review as the comment of a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from review.importance import ImportanceReport
from review.run_differences import best_runs, comparability_warnings, differing_keys, seed_noise, verdict
from review.run_reader import RunRecord, sweeps_of
from review.scaling.study import ScalingStudy, report_lines
from train.util.format import count, duration

MOST_KEYS, MOST_RUNS, SHOWN = 8, 100, 12
"""Rows beyond SHOWN are folded away."""


def render_comment(runs: Sequence[RunRecord], found: ImportanceReport | None, study: ScalingStudy | None) -> str:
    """A verdict, a table of runs with the keys that differ, the best run first; what mattered, what failed, and the scaling law."""
    keys, goal = differing_keys(runs), runs[0].goal
    front = {id(run) for run in best_runs(runs)}
    worth = {id(run): run.score if goal.minimize or run.score is None else -run.score for run in runs}
    order = sorted(
        runs, key=lambda run: (id(run) not in front, run.state != "done", worth[id(run)] is None, worth[id(run)] or 0.0)
    )
    lines = [f"**{escape_cell(verdict(runs))}**", ""] + [
        f"{escape_cell(sweep.status_text())}\n" for sweep in sweeps_of(runs)
    ]
    lines += [f"> {escape_cell(line)}\n" for line in comparability_warnings(runs)]
    goals = [goal.metric for goal in runs[0].goals]
    shown = keys[:MOST_KEYS]
    head = [table_row(["run", "state", *shown, *goals, "tokens", "time", "goodput"])]
    head.append(table_row(["---"] * (2 + len(shown)) + ["---:"] * (len(goals) + 3)))
    rows = [table_row(_cells(run, shown, id(run) in front)) for run in order[:MOST_RUNS]]
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
        lines.append("\nAlso different: " + ", ".join(f"`{escape_cell(key)}`" for key in keys[MOST_KEYS:]))
    if spread := seed_noise(runs):
        lines.append(
            f"\nStandard deviation between seeds: {spread[0]:.4f} ({goal.unit}; {spread[1]} degrees of freedom)."
        )
    if found is not None:
        ranks = ", ".join(
            f"{escape_cell(key.key)} {key.mean:.3g} ({key.low:.3g} to {key.high:.3g})" for key in found.keys[:MOST_KEYS]
        )
        trust = f"from {found.runs} runs, {max(found.explained, 0):.0%} of unseen runs' variance explained"
        weak = "" if found.explained > 0.3 else " That is too little to believe the order."
        lines.append(f"\nWhich keys mattered (error when shuffled, {goal.unit}; {trust}): {ranks}.{weak}")
    noted = [
        (run, [run.end_reason, *run.notes]) for run in order if run.notes or (run.end_reason and run.state != "pruned")
    ][:MOST_RUNS]
    lines += (
        [
            "",
            *(
                f"- {escape_cell(run.name)} ({run.state}): {escape_cell('; '.join(filter(None, said)))}"
                for run, said in noted
            ),
        ]
        if noted
        else []
    )
    if study is not None:
        lines += ["", "**Scaling law**", "", *(f"- {escape_cell(line)}" for line in report_lines(study))]
    return "\n".join(lines)


def escape_cell(text: Any) -> str:
    """A text that stays inside its cell and makes no markup, no mention and no link."""
    short = " ".join(str(text).split())[:600]
    for sign in "\\`*_{}[]<>|#~":
        short = short.replace(sign, f"&#{ord(sign)};" if sign in "<>|`" else f"\\{sign}" if sign in "\\*[]~" else sign)
    return short.replace("@", "@\u200b").replace("://", ":&#47;&#47;")


def table_row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def _cells(run: RunRecord, keys: Sequence[str], first: bool) -> list[str]:
    so_far = "" if run.state == "done" else " (so far)"
    facts = [
        *(
            ""
            if (value := run.goal_value(goal)) is None
            else f"{value:.4f}{so_far}"
            if abs(value) < 1e4
            else f"{value:.3g}{so_far}"
            for goal in run.goals
        ),
        "" if run.tokens is None else count(int(run.tokens)),
        "" if run.wall_s is None else duration(run.wall_s),
        "" if run.goodput is None else f"{run.goodput:.1%}",
    ]
    name = f"**{escape_cell(run.name)}** (best)" if first else escape_cell(run.name)
    return [name, run.state, *(escape_cell(_short(run.config_value(key))) for key in keys), *facts]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
