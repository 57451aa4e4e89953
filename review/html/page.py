"""Builds the HTML page of a review: one file that needs no server and no network.

Everything that comes from a run is embedded as JSON that cannot close its script element, and the page's script
inserts it as text, never as markup. The page's Content Security Policy allows only its two scripts, by their hashes,
so that markup which got in all the same could run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from review.colors import MAX_DISTINCT, SCALE, line_styles, loss_axis_range, scale_color, scale_position, score_range
from review.downsample import extreme_indices, moving_average
from review.html.parallel_axes import axis_position, parallel_coordinates
from review.importance import MIN_RUNS, ImportanceReport
from review.lenient_io import display_path, finite_number
from review.rank_times import slowest_rank_text, thin_windows
from review.run_differences import best_runs, comparability_warnings, differing_keys, verdict
from review.run_reader import SPEED, Floats, RunRecord, sweeps_of
from review.scaling.study import ScalingStudy, report_lines
from review.search_history import search_history
from review.wall_time import time_shares

HERE = Path(__file__).resolve().parent
MAX_POINTS, MIN_POINTS = 90_000, 200
"""Points of all curves together, and of each curve at least."""
MAX_SAMPLE_CHARS = 1_500_000
"""Characters of the samples of all runs together."""
RANK_COLUMNS = ("step", "fastest_s", "median_s", "slowest_s", "slowest_rank")
"""Fields of a window of ``ranks.jsonl`` that page.js reads."""
SUMMARY_KEYS = ("bits_per_byte", "step", "params", "starts")
"""Columns of the table taken from the summary as they are; the others are computed."""


def render_page(runs: Sequence[RunRecord], importances: ImportanceReport | None, study: ScalingStudy | None) -> str:
    """The complete HTML text of the page."""
    plotly, script = get_plotlyjs(), (HERE / "page.js").read_text("utf-8")
    text = {
        "hashes": " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (plotly, script)
        ),
        "count": str(len(runs)),
        "style": (HERE / "page.css").read_text("utf-8"),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "verdict": html.escape(verdict(runs)),
        "sweeps": "".join(f"<p>{html.escape(sweep.status_text())}</p>" for sweep in sweeps_of(runs)),
        "warnings": "".join(f'<p class="warn">{html.escape(line)}</p>' for line in comparability_warnings(runs)),
        "importance": html.escape(explain_importance(importances, runs)),
        "goal": html.escape(runs[0].goal.label),
        "data": embed_json(page_data(runs, importances, study)),
        "plotly": plotly,
        "script": script,
    }
    return Template((HERE / "page.html").read_text("utf-8")).substitute(text)


def page_data(
    runs: Sequence[RunRecord], importances: ImportanceReport | None, study: ScalingStudy | None
) -> dict[str, Any]:
    """The data that page.js shows, as JSON-like values; its keys are those that page.js reads."""
    keys, front = differing_keys(runs), {id(run) for run in best_runs(runs)}
    ids = {id(run): f"r{i}" for i, run in enumerate(runs)}
    styles = line_styles(runs)
    budget = max(MIN_POINTS, MAX_POINTS // max(len(runs), 1))
    sample_chars = MAX_SAMPLE_CHARS // max(len(runs), 1)
    shown = [
        {"id": f"r{i}", "colour": color, "dash": dash, "best": id(run) in front}
        | _run(run, keys, budget)
        | {"samples": _samples(run, sample_chars)}
        for i, (run, (color, dash)) in enumerate(zip(runs, styles, strict=True))
    ]
    return {
        "runs": shown,
        "keys": keys,
        "goals": [
            {"key": goal.metric, "least": goal.minimize, "title": goal.axis_title, "unit": goal.unit}
            for goal in runs[0].goals
        ],
        "few": len(runs) <= MAX_DISTINCT,
        "scale": SCALE,
        "range": score_range(runs),
        "focus": loss_axis_range(runs),
        "search": _search(runs, ids),
        "parallel": _parallel(runs, ids),
        "importance": asdict(importances) if importances else None,
        "scaling": _scaling(study) if study else None,
    }


def embed_json(value: Any) -> str:
    """JSON that is safe inside a script element: &, < and > are escaped in all strings."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def explain_importance(importances: ImportanceReport | None, runs: Sequence[RunRecord]) -> str:
    """The caption of the importance chart: its meaning, and how far it can be trusted."""
    if importances is None:
        done = sum(run.state == "done" for run in runs)
        return f"Needs {MIN_RUNS} finished runs that differ in a key; {done} {'is' if done == 1 else 'are'} finished."
    trust, goal = "", runs[0].goal
    if not importances.explained > 0.3:
        trust = " That is little: more runs are needed before this ranking means anything."
    return (
        f"A random forest predicts {goal.label} from the keys that differ. "
        f"A bar says by how much its error ({goal.unit}) on runs that it has not seen grows "
        "when that key is shuffled among them; "
        "the whisker is the middle 80 % of 20 draws of runs. Keys "
        f"that were changed together share their importance. From {importances.runs} finished runs; "
        f"the forest explains {max(importances.explained, 0):.0%} of the variance of unseen ones.{trust}"
    )


def _run(run: RunRecord, keys: list[str], budget: int) -> dict[str, Any]:
    facts: dict[str, Any] = {key: finite_number(run.summary.get(key)) for key in SUMMARY_KEYS}
    facts |= {
        "val_loss": run.val_loss,
        "tokens": run.tokens,
        "starts": finite_number(run.run_json.get("starts")) or facts["starts"],
    }
    facts |= {name: run.speed(name) for name in SPEED}
    facts |= {"wall_s": run.wall_s, "goodput": run.goodput} | {goal.metric: run.goal_value(goal) for goal in run.goals}
    if facts["step"] is None:
        facts["step"] = int(run.steps[-1]) if len(run.steps) else run.trial.step if run.trial else None
    environment = {"folder": display_path(run.folder), "corpus": run.corpus[:12] or None} | {
        str(key): value if isinstance(value, str | int | float) else json.dumps(value)[:500]
        for key, value in run.environment.items()
    }
    return facts | {
        "name": run.name,
        "state": run.state,
        "notes": "; ".join(filter(None, [run.end_reason, *run.notes])),
        "config": {key: run.config_value(key) for key in keys},
        "shares": time_shares(run),
        "environment": environment,
        "curve": _curve(run, budget),
        "held": _held(run),
        "ranks": _ranks(run),
    }


def _ranks(run: RunRecord) -> dict[str, Any] | None:
    """The curve of the slowest and the median rank, and the sentence on it; None without a reading."""
    if not run.rank_windows:
        return None
    kept = thin_windows(run.rank_windows)
    columns: dict[str, Any] = {"text": slowest_rank_text(run.rank_windows)}
    for name in RANK_COLUMNS:
        columns[name] = [getattr(window, name) for window in kept]
    return columns


def _curve(run: RunRecord, budget: int) -> dict[str, Any] | None:
    if not len(run.steps):
        return None
    columns = run.columns
    kept = extreme_indices([columns["loss"], columns["grad_norm"], columns["tokens_per_s"]], budget)
    values = {name: columns[name] for name in ("tokens", "seconds", "loss", "tokens_per_s", "grad_norm", "lr")}
    values |= {f"loss_{percent}": moving_average(columns["loss"], percent / 100) for percent in (1, 5)}
    return {"steps": run.steps[kept].tolist()} | {name: _short(value[kept]) for name, value in values.items()}


def _held(run: RunRecord) -> dict[str, Any]:
    if not len(run.steps):
        return {"steps": []}
    measured = np.flatnonzero(np.isfinite(run.columns["val_loss"]))
    kept = measured[extreme_indices([run.columns["val_loss"][measured]], MIN_POINTS)]
    return {"steps": run.steps[kept].tolist()} | {
        name: _short(run.columns[name][kept]) for name in ("tokens", "seconds", "val_loss")
    }


def _samples(run: RunRecord, max_chars: int) -> list[dict[str, Any]]:
    """The newest samples that fit into ``max_chars``, oldest first, each cut at 2,000 characters."""
    kept: list[dict[str, Any]] = []
    for sample in reversed(run.samples):
        cut = {
            "step": sample["step"],
            "prompt": str(sample.get("prompt", ""))[:500],
            "text": str(sample.get("text", ""))[:2000],
        }
        max_chars -= len(cut["prompt"]) + len(cut["text"])
        if max_chars < 0:
            break
        kept.append(cut)
    return kept[::-1]


def _search(runs: Sequence[RunRecord], ids: dict[int, str]) -> dict[str, Any] | None:
    history = search_history(runs)
    if history is None:
        return None
    dots = [
        {
            "id": ids[id(dot.run)],
            "name": dot.run.name,
            "score": dot.run.score,
            "why": dot.run.end_reason,
            "number": dot.number,
            "kind": dot.kind,
            "marker": dot.marker,
            "colour": dot.color,
            "shown": dot.shown,
        }
        for dot in history.dots
    ]
    return {"dots": dots, "best": history.best, "range": history.range}


def _parallel(runs: Sequence[RunRecord], ids: dict[int, str]) -> dict[str, Any] | None:
    parallel, scale = parallel_coordinates(runs), score_range(runs)
    if parallel is None or scale is None:
        return None
    lines = [
        {
            "id": ids[id(run)],
            "name": run.name,
            "state": run.state,
            "at": [axis_position(axis, value) for axis, value in zip(parallel.axes, values, strict=False)],
            "values": [f"{v:.5g}" if isinstance(v, float) else str(v) for v in values],
            "colour": scale_color(scale_position(run.score or 0.0, scale)) if run.state == "done" else None,
        }
        for run, values in zip(parallel.runs, parallel.values, strict=True)
    ]
    axes = [{"key": axis.key, "ticks": axis.ticks} for axis in parallel.axes]
    return {"axes": axes, "lines": lines[::-1]}  # what is drawn last, the best, lies on top


def _scaling(study: ScalingStudy) -> dict[str, Any]:
    curves = []
    sizes = sorted({p.n for p in study.fitted})
    for i, n in enumerate(sizes):
        mine = [p for p in study.fitted if p.n == n]
        x = np.geomspace(mine[0].compute / 1.3, mine[-1].compute * 1.3, 40)
        curve = {"x": _short(x), "y": _short(study.law.loss(n, x / study.k / n))}
        color = scale_color(0.1 + 0.9 * i / max(len(sizes) - 1, 1))
        points: dict[str, Any] = {"x": [p.compute for p in mine]}
        points["y"] = [p.loss for p in mine]
        points["names"] = [p.name for p in mine]
        curves.append({"n": n, "colour": color, "curve": curve} | points)
    predictions = [asdict(p) | {"x": study.k * p.n * p.d} for p in (*study.held_out, study.next_size)]
    lowest = min(p.compute for p in study.fitted)
    highest = max(p["x"] for p in predictions)
    compute = np.geomspace(lowest / 1.5, highest * 1.3, 60)
    frontier = {"x": _short(compute), "y": _short(study.law.loss(*study.law.frontier(compute, study.k)))}
    return {"sizes": curves, "guesses": predictions, "frontier": frontier, "report": report_lines(study)}


def _short(values: Floats) -> list[float | None]:
    """Values rounded to five digits, more than a chart can show; None where not finite."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
