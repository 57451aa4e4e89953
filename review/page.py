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

from review.axes import axes_of, place
from review.compare import differing, ranked, verdict, warnings
from review.goodput import shares
from review.importance import LEAST_RUNS, Importances
from review.look import FEW, SCALE, blend, colours
from review.read import Floats, Run, number, relative
from review.scaling import Study, report
from review.thin import keep, smooth

HERE = Path(__file__).resolve().parent
POINTS, LEAST_POINTS = 90_000, 200
"""Points of all curves together; of each one at least."""
SAMPLES = 1_500_000
"""Characters of samples, of all runs together."""
FACTS = ("val_loss", "bits_per_byte", "step", "tokens", "params", "wall_s", "goodput", "starts")


def render(runs: Sequence[Run], found: Importances | None, study: Study | None) -> str:
    """The whole page."""
    plotly, script = get_plotlyjs(), (HERE / "page.js").read_text("utf-8")
    text = {
        "hashes": " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (plotly, script)),
        "count": str(len(runs)),
        "style": (HERE / "page.css").read_text("utf-8"),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "verdict": html.escape(verdict(runs)),
        "warnings": "".join(f'<p class="warn">{html.escape(line)}</p>' for line in warnings(runs)),
        "importance": html.escape(explain(found)),
        "data": embed(content(runs, found, study)),
        "plotly": plotly,
        "script": script,
    }
    return Template((HERE / "page.html").read_text("utf-8")).substitute(text)


def content(runs: Sequence[Run], found: Importances | None, study: Study | None) -> dict[str, Any]:
    """What the page's script shows."""
    keys, best = differing(runs), [] if warnings(runs) else ranked(runs)
    losses = [loss for run in runs if (loss := run.val_loss) is not None]
    drawn = {id(run): f"r{i}" for i, run in enumerate(runs)}
    looks = colours(runs)
    budget = max(LEAST_POINTS, POINTS // max(len(runs), 1))
    written = SAMPLES // max(len(runs), 1)
    shown = [
        {"id": f"r{i}", "colour": colour, "dash": dash, "best": bool(best) and run is best[0][1]}
        | _run(run, keys, budget)
        | {"samples": _samples(run, written)}
        for i, (run, (colour, dash)) in enumerate(zip(runs, looks, strict=True))
    ]
    return {
        "runs": shown,
        "keys": keys,
        "few": len(runs) <= FEW,
        "scale": SCALE,
        "range": [min(losses), max(losses)] if losses else None,
        "focus": focus(runs),
        "sort": "val_loss" if losses else "name",
        "parallel": _parallel(runs, drawn),
        "importance": asdict(found) if found else None,
        "scaling": _scaling(study) if study else None,
    }


def embed(value: Any) -> str:
    """JSON that stands inside a script element whatever strings it holds: no sign of markup is left in it."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def explain(found: Importances | None) -> str:
    """What the importances mean, and how far they can be trusted."""
    if found is None:
        return f"Needs {LEAST_RUNS} finished runs."
    trust = "" if found.explained > 0.3 else " That is little: more runs are needed before this ranking means anything."
    return (
        "A random forest predicts held-out loss from the keys that differ. A bar says by how many nats per token its error on runs "
        "that it has not seen grows when that key is shuffled among them; the whisker is the middle 80 % of 20 draws of runs. Keys "
        f"that were changed together share their importance. From {found.runs} runs; the forest explains "
        f"{max(found.explained, 0):.0%} of the variance of unseen ones.{trust}"
    )


def focus(runs: Sequence[Run]) -> list[float] | None:
    """The span of losses worth looking at: after the first tenth of each run, whose fall would press all else flat."""
    tops, lows = [], []
    for run in runs:
        if len(run.steps):
            loss, held = run.columns["loss"], run.columns["val_loss"]
            rest = np.concatenate([loss[len(loss) // 10 :], held])
            known = rest[np.isfinite(rest)]
            if len(known):
                tops.append(float(np.quantile(known, 0.98)))
                lows.append(float(known.min()))
    if not tops or max(tops) <= min(lows):
        return None
    margin = 0.06 * (max(tops) - min(lows))
    return [max(min(lows) - margin, min(lows) / 2), max(tops) + margin]


def _run(run: Run, keys: list[str], budget: int) -> dict[str, Any]:
    facts: dict[str, Any] = {key: number(run.summary.get(key)) for key in FACTS}
    facts |= {"val_loss": run.val_loss, "tokens": run.tokens, "starts": number(run.kept.get("starts")) or facts["starts"]}
    if facts["step"] is None and len(run.steps):
        facts["step"] = int(run.steps[-1])
    environment = {"folder": relative(run.folder), "corpus": run.corpus[:12] or None} | {
        str(key): value if isinstance(value, str | int | float) else json.dumps(value)[:500]
        for key, value in run.environment.items()
    }
    return facts | {
        "name": run.name,
        "state": run.state,
        "notes": "; ".join(run.notes),
        "config": {key: run.config.get(key) for key in keys},
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
        cut = {"step": sample["step"], "prompt": str(sample.get("prompt", ""))[:500], "text": str(sample.get("text", ""))[:2000]}
        most -= len(cut["prompt"]) + len(cut["text"])
        if most < 0:
            break
        kept.append(cut)
    return kept[::-1]


def _parallel(runs: Sequence[Run], ids: dict[int, str]) -> dict[str, Any] | None:
    found = axes_of(runs)
    if found is None:
        return None
    losses = [run.val_loss or 0.0 for run in found.runs]
    span = max(losses) - min(losses) or 1.0
    rows = zip(found.runs, found.values, losses, strict=True)
    lines = [
        {
            "id": ids[id(run)],
            "name": run.name,
            "at": [place(axis, value) for axis, value in zip(found.axes, values, strict=True)],
            "values": [f"{v:.5g}" if isinstance(v, float) else str(v) for v in values],
            "colour": blend((loss - min(losses)) / span),
        }
        for run, values, loss in rows
    ]
    return {"axes": [{"key": axis.key, "ticks": axis.ticks} for axis in found.axes], "lines": lines[::-1]}  # the best on top


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
