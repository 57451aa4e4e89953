"""Renders a review as Markdown, for the comment of a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from review.importance import ImportanceReport
from review.lenient_io import finite_number
from review.rank_times import is_notable, slowest_rank_text
from review.run_differences import best_runs, comparability_warnings, differing_keys, seed_noise, verdict
from review.run_reader import RunRecord, sweeps_of
from review.scaling.study import ScalingStudy, report_lines
from review.sweep_reader import Goal
from train.util.format import count, duration

SPEED_WORDS = {"tokens_per_s": "tokens/s", "mfu": "MFU", "gpu_peak_gib": "GPU GiB"}
"""Columns of the table for what ``RunRecord.speed`` has, where any run has it."""
MAX_KEYS, MAX_RUNS, UNFOLDED_ROWS = 8, 100, 12
"""Rows beyond UNFOLDED_ROWS are folded away."""


def render_comment(runs: Sequence[RunRecord], importances: ImportanceReport | None, study: ScalingStudy | None) -> str:
    """Markdown: verdict, table of runs with the keys that differ (best first), importances, failures, scaling law."""
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
    shown = keys[:MAX_KEYS]
    speeds = _measured_speeds(runs)
    facts = [*goals, "tokens", "time", "goodput", *map(SPEED_WORDS.__getitem__, speeds)]
    head = [table_row(["run", "state", *shown, *facts]), table_row(["---"] * (2 + len(shown)) + ["---:"] * len(facts))]
    rows = []
    for run in order[:MAX_RUNS]:
        rows.append(table_row([*_cells(run, shown, id(run) in front), *_speed_cells(run, speeds)]))
    lines += [*head, *rows[:UNFOLDED_ROWS]]
    if rows[UNFOLDED_ROWS:]:
        lines += [
            "",
            f"<details><summary>{len(rows) - UNFOLDED_ROWS} more</summary>",
            "",
            *head,
            *rows[UNFOLDED_ROWS:],
            "",
            "</details>",
        ]
    if len(order) > MAX_RUNS:
        lines.append(f"\n... and {len(order) - MAX_RUNS} more runs.")
    if len(keys) > MAX_KEYS:
        lines.append("\nAlso different: " + ", ".join(f"`{escape_cell(key)}`" for key in keys[MAX_KEYS:]))
    if spread := seed_noise(runs):
        lines.append(
            f"\nStandard deviation between seeds: {spread[0]:.4f} ({goal.unit}; {spread[1]} degrees of freedom)."
        )
    if importances is not None:
        lines.append(_importance_line(importances, goal))
    noted = [run for run in order if run.notes or (run.end_reason and run.state != "pruned")]
    if noted:
        lines += ["", *(_notes_line(run) for run in noted[:MAX_RUNS])]
    if slow := [line for run in order[:MAX_RUNS] if (line := _ranks_line(run))]:
        lines += ["", *slow]
    if mixed := [line for run in order[:MAX_RUNS] if (line := _sources_line(run))]:
        lines += ["", *mixed]
    if study is not None:
        lines += ["", "**Scaling law**", "", *(f"- {escape_cell(line)}" for line in report_lines(study))]
    return "\n".join(lines)


def _importance_line(importances: ImportanceReport, goal: Goal) -> str:
    keys = importances.keys[:MAX_KEYS]
    ranks = ", ".join(f"{escape_cell(k.key)} {k.mean:.3g} ({k.low:.3g} to {k.high:.3g})" for k in keys)
    trust = f"from {importances.runs} runs, {max(importances.explained, 0):.0%} of unseen runs' variance explained"
    weak = "" if importances.explained > 0.3 else " That is too little to believe the order."
    return f"\nWhich keys mattered (error when shuffled, {goal.unit}; {trust}): {ranks}.{weak}"


def _notes_line(run: RunRecord) -> str:
    notes = "; ".join(filter(None, [run.end_reason, *run.notes]))
    return f"- {escape_cell(run.name)} ({run.state}): {escape_cell(notes)}"


def _ranks_line(run: RunRecord) -> str:
    """The sentence on a run's slowest rank, where it is slow enough to tell of."""
    return f"- {escape_cell(run.name)}: {slowest_rank_text(run.rank_windows)}" if is_notable(run.rank_windows) else ""


def _sources_line(run: RunRecord) -> str:
    """Tokens and epochs that a run has read of each source of its mixture, and its held-out loss; empty without one."""
    parts = []
    for name in (key.removeprefix("epochs/") for key in run.summary if key.startswith("epochs/")):
        kinds = ("epochs", "tokens", "val_loss")
        epochs, tokens, loss = (finite_number(run.summary.get(f"{kind}/{name}")) for kind in kinds)
        facts = [f"{count(int(tokens))} tokens"] if tokens is not None else []
        facts += [f"{epochs:.2f} epochs"] if epochs is not None else []
        facts += [f"held-out loss {loss:.4f}"] if loss is not None else []
        parts.append(f"{escape_cell(name)} {', '.join(facts)}")
    return f"- {escape_cell(run.name)}: {'; '.join(parts)}" if parts else ""


def escape_cell(text: Any) -> str:
    """Escapes a text so that it stays inside its table cell and makes no markup, mention or link."""
    short = " ".join(str(text).split())[:600]
    for sign in "\\`*_{}[]<>|#~":
        short = short.replace(sign, f"&#{ord(sign)};" if sign in "<>|`" else f"\\{sign}" if sign in "\\*[]~" else sign)
    return short.replace("@", "@\u200b").replace("://", ":&#47;&#47;")


def table_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _cells(run: RunRecord, keys: Sequence[str], first: bool) -> list[str]:
    so_far = "" if run.state == "done" else " (so far)"
    facts = [
        *(_score_text(run.goal_value(goal), so_far) for goal in run.goals),
        "" if run.tokens is None else count(int(run.tokens)),
        "" if run.wall_s is None else duration(run.wall_s),
        "" if run.goodput is None else f"{run.goodput:.1%}",
    ]
    name = f"**{escape_cell(run.name)}** (best)" if first else escape_cell(run.name)
    return [name, run.state, *(escape_cell(_short(run.config_value(key))) for key in keys), *facts]


def _measured_speeds(runs: Sequence[RunRecord]) -> list[str]:
    """The keys of SPEED_WORDS that any run has."""
    measured: set[str] = set()
    for run in runs:
        measured.update(name for name in SPEED_WORDS if run.speed(name) is not None)
    return [name for name in SPEED_WORDS if name in measured]


def _speed_cells(run: RunRecord, names: Sequence[str]) -> list[str]:
    texts = {"mfu": "{:.1%}", "gpu_peak_gib": "{:.1f}"}
    cells = []
    for name in names:
        value = run.speed(name)
        cells.append("" if value is None else texts[name].format(value) if name in texts else count(value))
    return cells


def _score_text(value: float | None, suffix: str) -> str:
    if value is None:
        return ""
    return f"{value:.4f}{suffix}" if abs(value) < 1e4 else f"{value:.3g}{suffix}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
