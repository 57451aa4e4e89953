"""The page of a review: one HTML file that needs nothing else, no server and no network.

All that comes from a run lies in it as JSON that cannot end its element, and the page's script makes text of it, never markup. The
page's own policy (CSP) lets only its two scripts run, known by their hashes: markup that got in all the same could do nothing.
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

from review.colors import FEW, SCALE, blend, colours, focus, rank, span
from review.downsample import keep, smooth
from review.html.parallel_axes import axes_of, place
from review.importance import LEAST_RUNS, Importances
from review.lenient_io import number, relative
from review.run_differences import best, differing, verdict, warnings
from review.run_reader import Floats, Run, sweeps_of
from review.scaling.study import Study, report
from review.search_history import search
from review.wall_time import shares

HERE = Path(__file__).resolve().parent
POINTS, LEAST_POINTS = 90_000, 200
"""Points of all curves together; of each one at least."""
SAMPLES = 1_500_000
"""Characters of samples, of all runs together."""
FACTS = ("bits_per_byte", "step", "params", "starts")
"""Of the summary; what else the table holds is worked out."""


def render(runs: Sequence[Run], found: Importances | None, study: Study | None) -> str:
    """The whole page."""
    plotly, script = get_plotlyjs(), (HERE / "page.js").read_text("utf-8")
    text = {
        "hashes": " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (plotly, script)
        ),
        "count": str(len(runs)),
        "style": (HERE / "page.css").read_text("utf-8"),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "verdict": html.escape(verdict(runs)),
        "sweeps": "".join(f"<p>{html.escape(sweep.words())}</p>" for sweep in sweeps_of(runs)),
        "warnings": "".join(f'<p class="warn">{html.escape(line)}</p>' for line in warnings(runs)),
        "importance": html.escape(explain(found, runs)),
        "goal": html.escape(runs[0].goal.words),
        "data": embed(content(runs, found, study)),
        "plotly": plotly,
        "script": script,
    }
    return Template((HERE / "page.html").read_text("utf-8")).substitute(text)


def content(runs: Sequence[Run], found: Importances | None, study: Study | None) -> dict[str, Any]:
    """What the page's script shows."""
    keys, front = differing(runs), {id(run) for run in best(runs)}
    drawn = {id(run): f"r{i}" for i, run in enumerate(runs)}
    looks = colours(runs)
    budget = max(LEAST_POINTS, POINTS // max(len(runs), 1))
    written = SAMPLES // max(len(runs), 1)
    shown = [
        {"id": f"r{i}", "colour": colour, "dash": dash, "best": id(run) in front}
        | _run(run, keys, budget)
        | {"samples": _samples(run, written)}
        for i, (run, (colour, dash)) in enumerate(zip(runs, looks, strict=True))
    ]
    return {
        "runs": shown,
        "keys": keys,
        "goals": [
            {"key": goal.metric, "least": goal.least, "title": goal.title, "unit": goal.unit} for goal in runs[0].goals
        ],
        "few": len(runs) <= FEW,
        "scale": SCALE,
        "range": span(runs),
        "focus": focus(runs),
        "search": _search(runs, drawn),
        "parallel": _parallel(runs, drawn),
        "importance": asdict(found) if found else None,
        "scaling": _scaling(study) if study else None,
    }


def embed(value: Any) -> str:
    """JSON that stands inside a script element whatever strings it holds: no sign of markup is left in it."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def explain(found: Importances | None, runs: Sequence[Run]) -> str:
    """What the importances mean, and how far they can be trusted."""
    if found is None:
        done = sum(run.state == "done" for run in runs)
        return f"Needs {LEAST_RUNS} finished runs that differ in a key; {done} {'is' if done == 1 else 'are'} finished."
    trust = "" if found.explained > 0.3 else " That is little: more runs are needed before this ranking means anything."
    goal = runs[0].goal
    return (
        f"A random forest predicts {goal.words} from the keys that differ. A bar says by how much its error ({goal.unit}) on runs "
        "that it has not seen grows when that key is shuffled among them; the whisker is the middle 80 % of 20 draws of runs. Keys "
        f"that were changed together share their importance. From {found.runs} finished runs; the forest explains "
        f"{max(found.explained, 0):.0%} of the variance of unseen ones.{trust}"
    )


def _run(run: Run, keys: list[str], budget: int) -> dict[str, Any]:
    facts: dict[str, Any] = {key: number(run.summary.get(key)) for key in FACTS}
    facts |= {
        "val_loss": run.val_loss,
        "tokens": run.tokens,
        "starts": number(run.kept.get("starts")) or facts["starts"],
    }
    facts |= {"wall_s": run.wall_s, "goodput": run.goodput} | {goal.metric: run.measured(goal) for goal in run.goals}
    if facts["step"] is None:
        facts["step"] = int(run.steps[-1]) if len(run.steps) else run.trial.step if run.trial else None
    environment = {"folder": relative(run.folder), "corpus": run.corpus[:12] or None} | {
        str(key): value if isinstance(value, str | int | float) else json.dumps(value)[:500]
        for key, value in run.environment.items()
    }
    return facts | {
        "name": run.name,
        "state": run.state,
        "notes": "; ".join(filter(None, [run.why, *run.notes])),
        "config": {key: run.value(key) for key in keys},
        "shares": shares(run),
        "environment": environment,
        "curve": _curve(run, budget),
        "held": _held(run),
    }


def _curve(run: Run, budget: int) -> dict[str, Any] | None:
    if not len(run.steps):
        return None
    columns = run.columns
    kept = keep([columns["loss"], columns["grad_norm"], columns["tokens_per_s"]], budget)
    values = {name: columns[name] for name in ("tokens", "seconds", "loss", "tokens_per_s", "grad_norm", "lr")}
    values |= {f"loss_{percent}": smooth(columns["loss"], percent / 100) for percent in (1, 5)}
    return {"steps": run.steps[kept].tolist()} | {name: _short(value[kept]) for name, value in values.items()}


def _held(run: Run) -> dict[str, Any]:
    if not len(run.steps):
        return {"steps": []}
    measured = np.flatnonzero(np.isfinite(run.columns["val_loss"]))
    kept = measured[keep([run.columns["val_loss"][measured]], LEAST_POINTS)]
    return {"steps": run.steps[kept].tolist()} | {
        name: _short(run.columns[name][kept]) for name in ("tokens", "seconds", "val_loss")
    }


def _samples(run: Run, most: int) -> list[dict[str, Any]]:
    """The newest samples that fit, each cut at 2,000 characters."""
    kept: list[dict[str, Any]] = []
    for sample in reversed(run.samples):
        cut = {
            "step": sample["step"],
            "prompt": str(sample.get("prompt", ""))[:500],
            "text": str(sample.get("text", ""))[:2000],
        }
        most -= len(cut["prompt"]) + len(cut["text"])
        if most < 0:
            break
        kept.append(cut)
    return kept[::-1]


def _search(runs: Sequence[Run], ids: dict[int, str]) -> dict[str, Any] | None:
    found = search(runs)
    if found is None:
        return None
    dots = [
        {"id": ids[id(dot.run)], "name": dot.run.name, "score": dot.run.score, "why": dot.run.why}
        | {key: getattr(dot, key) for key in ("number", "kind", "marker", "colour", "shown")}
        for dot in found.dots
    ]
    return {"dots": dots, "best": found.best, "range": found.range}


def _parallel(runs: Sequence[Run], ids: dict[int, str]) -> dict[str, Any] | None:
    found, scale = axes_of(runs), span(runs)
    if found is None or scale is None:
        return None
    lines = [
        {
            "id": ids[id(run)],
            "name": run.name,
            "state": run.state,
            "at": [place(axis, value) for axis, value in zip(found.axes, values, strict=False)],
            "values": [f"{v:.5g}" if isinstance(v, float) else str(v) for v in values],
            "colour": blend(rank(run.score or 0.0, scale)) if run.state == "done" else None,
        }
        for run, values in zip(found.runs, found.values, strict=True)
    ]
    return {
        "axes": [{"key": axis.key, "ticks": axis.ticks} for axis in found.axes],
        "lines": lines[::-1],
    }  # the best on top


def _scaling(study: Study) -> dict[str, Any]:
    sizes = []
    numbers = sorted({p.n for p in study.fitted})
    for i, n in enumerate(numbers):
        mine = [p for p in study.fitted if p.n == n]
        x = np.geomspace(mine[0].compute / 1.3, mine[-1].compute * 1.3, 40)
        curve = {"x": _short(x), "y": _short(study.law.loss(n, x / study.k / n))}
        colour = blend(0.1 + 0.9 * i / max(len(numbers) - 1, 1))
        points = {"x": [p.compute for p in mine], "y": [p.loss for p in mine], "names": [p.name for p in mine]}
        sizes.append({"n": n, "colour": colour, "curve": curve} | points)
    guesses = [asdict(guess) | {"x": study.k * guess.n * guess.d} for guess in (*study.held_out, study.further)]
    compute = np.geomspace(min(p.compute for p in study.fitted) / 1.5, max(g["x"] for g in guesses) * 1.3, 60)
    frontier = {"x": _short(compute), "y": _short(study.law.loss(*study.law.frontier(compute, study.k)))}
    return {"sizes": sizes, "guesses": guesses, "frontier": frontier, "report": report(study)}


def _short(values: Floats) -> list[float | None]:
    """Five digits are more than a chart can show."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
