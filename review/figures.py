"""The pictures of a review, as PNG files: what goes into a document or a slide. Drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")  # draws files, wherever there is no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from review.colors import MAX_DISTINCT, SCALE, line_styles, loss_axis_range, scale_color, scale_position, score_range
from review.downsample import extreme_indices, moving_average
from review.html.parallel_axes import axis_position, parallel_coordinates
from review.importance import ImportanceReport
from review.run_differences import ranked_runs
from review.run_reader import RunRecord
from review.scaling.study import ScalingStudy
from review.search_history import SearchHistory, search_history
from review.wall_time import time_shares

EARLY: dict[str, Any] = {"color": "#B5B5B5", "linewidth": 0.8, "alpha": 0.8}
TICK: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "fontsize": 7, "va": "center"}
BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
DASH = {"solid": "-", "dash": "--"}
XS = {"steps": "optimizer steps", "tokens": "tokens trained on", "seconds": "seconds of training"}
POINTS, BARS = 1500, 40


def write_figures(
    runs: Sequence[RunRecord], found: ImportanceReport | None, study: ScalingStudy | None, folder: Path
) -> list[Path]:
    """Every picture that these runs have data for."""
    drawn: dict[str, Figure | None] = {f"loss_{x}": plot_curves(runs, x, "loss") for x in XS}
    drawn |= {"throughput": plot_curves(runs, "steps", "tokens_per_s"), "goodput": plot_goodput(runs)}
    drawn |= {
        "search": plot_search(search_history(runs), runs),
        "parallel": plot_parallel(runs),
        "importance": plot_importance(found, runs),
        "scaling": plot_scaling(study),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in drawn.items():
        if figure is not None:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=120)
            plt.close(figure)
    return files


def plot_curves(runs: Sequence[RunRecord], x: str, y: str) -> Figure | None:
    """A measure over ``x`` for every run that has it; with the loss, the held-out loss as points."""
    looks = [(run, *look) for run, look in zip(runs, line_styles(runs), strict=True) if len(run.steps)]
    if not looks:
        return None
    many, held_out = len(runs) > MAX_DISTINCT, y == "loss"
    if many:  # the best on top
        order = {id(run): i for i, (_, run) in enumerate(ranked_runs(runs))}
        looks.sort(key=lambda look: -order.get(id(look[0]), len(runs)))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, colour, dash in looks:
        at, values = (run.steps if x == "steps" else run.columns[x]), moving_average(run.columns[y], 0.05)
        kept = extreme_indices([values], POINTS)
        kept = kept[np.isfinite(values[kept])]
        width, label = 0.9 if many else 1.2, plain_text(run.legend_label)
        axes.plot(at[kept], values[kept], color=colour, linestyle=DASH[dash], linewidth=width, label=label)
        held = np.flatnonzero(np.isfinite(run.columns["val_loss"]) & held_out)
        edge, size = ("none", 3.5) if many else ("black", 5)
        axes.plot(
            at[held],
            run.columns["val_loss"][held],
            "o",
            color=colour,
            markersize=size,
            markeredgecolor=edge,
            markeredgewidth=0.6,
        )
    axes.set(xlabel=XS[x], ylabel="loss (nats per token)" if held_out else "tokens per second, all workers")
    axes.set_title(
        "training (lines, averaged over 5 % of the run) and held out (points)" if held_out else "", fontsize=10
    )
    axes.grid(alpha=0.3)
    if held_out and (seen := loss_axis_range(runs)):
        axes.set_ylim(*seen)
    elif not held_out:
        axes.set_ylim(bottom=0)
    if not many:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    else:
        _scale(figure, axes, runs)
    return figure


def plot_goodput(runs: Sequence[RunRecord]) -> Figure | None:
    """Where the wall time of all starts went, a bar a run."""
    there = [(run, parts) for run in runs if (parts := time_shares(run))]
    rows = there[:BARS]
    if not rows:
        return None
    causes = list(dict.fromkeys(cause for _, parts in rows for cause in parts))
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.32 * len(rows)), layout="constrained")
    left = np.zeros(len(rows))
    cycle = ("#228833", "#CCBB44", "#4477AA", "#EE6677", "#AA3377", "#66CCEE", "#BBBBBB")
    for i, cause in enumerate(causes):
        values = np.array([100 * parts.get(cause, 0.0) for _, parts in rows])
        axes.barh(
            [plain_text(run.legend_label) for run, _ in rows],
            values,
            left=left,
            color=cycle[i % len(cycle)],
            label=plain_text(cause),
        )
        left += values
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_title(f"the first {BARS} of {len(there)} runs" if len(there) > BARS else "", fontsize=9)
    axes.set(xlabel="% of the wall time of all starts", xlim=(0, 100))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_parallel(runs: Sequence[RunRecord]) -> Figure | None:
    """Parallel coordinates: a line a run, an axis a key that differs, the last one what the runs are compared by."""
    found, scale = parallel_coordinates(runs), score_range(runs)
    if found is None or scale is None:
        return None
    names = found.axes
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(names) + 1), 4.5), layout="constrained")
    early = any(run.state != "done" for run in found.runs)
    for run, values in reversed(list(zip(found.runs, found.values, strict=True))):  # the best on top
        row = [axis_position(axis, value) for axis, value in zip(names, values, strict=False)]
        graded: dict[str, Any] = {
            "color": scale_color(scale_position(run.score or 0.0, scale)),
            "linewidth": 1.4,
            "alpha": 0.9,
        }
        axes.plot(range(len(row)), row, **(graded if run.state == "done" else EARLY))
    for i, axis in enumerate(names):
        axes.axvline(i, color="#888888", linewidth=0.8)
        for at, text in axis.ticks:
            axes.annotate(plain_text(text), (i, at), bbox=BOX, **TICK)
    axes.set_xticks(range(len(names)), [plain_text(axis.key) for axis in names], rotation=20, ha="right", fontsize=8)
    axes.set(yticks=[], xlim=(-0.1, len(names) - 0.75))
    axes.set_title("grey: trials that ended early" if early else "", fontsize=9)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    _scale(figure, axes, runs)
    return figure


def plot_search(found: SearchHistory | None, runs: Sequence[RunRecord]) -> Figure | None:
    """What each trial of a sweep came to, in their order, and the best so far."""
    if found is None:
        return None
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for kind in dict.fromkeys(dot.kind for dot in found.dots):
        dots = [dot for dot in found.dots if dot.kind == kind]
        at, colours_ = [dot.number for dot in dots], [dot.color for dot in dots]
        axes.scatter(at, [dot.shown for dot in dots], c=colours_, marker=dots[0].marker, s=34, label=kind, zorder=3)
    if found.best:
        axes.plot(
            *zip(*found.best, strict=True), drawstyle="steps-post", color="#444444", linewidth=1, label="best so far"
        )
    axes.set(xlabel="trial", ylabel=runs[0].goal.axis_title, ylim=found.range)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def plot_importance(found: ImportanceReport | None, runs: Sequence[RunRecord]) -> Figure | None:
    """Importance of keys with the middle 80 % of the draws."""
    if found is None:
        return None
    keys = found.keys[:15][::-1]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.4 * len(keys)), layout="constrained")
    means = np.array([key.mean for key in keys])
    reach = np.array([(max(key.mean - key.low, 0), max(key.high - key.mean, 0)) for key in keys]).T
    axes.barh([plain_text(key.key) for key in keys], means, xerr=reach, color="#4477AA", ecolor="#444444", capsize=3)
    axes.set_xlabel(f"error of prediction when the key is shuffled ({runs[0].goal.unit})")
    axes.set_title(
        f"{found.runs} runs; the forest explains {max(found.explained, 0):.0%} of unseen runs' variance", fontsize=9
    )
    return figure


def plot_scaling(study: ScalingStudy | None) -> Figure | None:
    """Loss over compute with the law's curves, the frontier, and what it foretold beside what was measured."""
    if study is None:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = sorted({p.n for p in study.fitted})
    low, high = min(p.compute for p in study.fitted), study.k * study.next_size.n * study.next_size.d
    compute = np.geomspace(low / 1.5, high * 1.3, 100)
    for n, colour in zip(sizes, _map()(np.linspace(0.1, 0.95, len(sizes))), strict=True):
        mine = [p for p in study.fitted if p.n == n]
        left.plot([p.compute for p in mine], [p.loss for p in mine], "o", color=colour, label=f"{n:,} parameters")
        span = np.geomspace(mine[0].compute / 1.3, mine[-1].compute * 1.3, 50)
        left.plot(span, study.law.loss(n, span / study.k / n), "-", color=colour, linewidth=1)
    best_n, best_d = study.law.frontier(compute, study.k)
    left.plot(compute, study.law.loss(best_n, best_d), "k--", linewidth=1, label="frontier")
    _guesses(left, study, lambda guess: study.k * guess.n * guess.d)
    left.set(xscale="log", xlabel="compute (FLOPs)", ylabel="held-out loss (nats per token)")
    draws = np.array([draw.frontier(compute, study.k)[0] for draw in study.draws])
    right.fill_between(
        compute,
        *np.quantile(draws, (0.1, 0.9), axis=0),
        color="#4477AA",
        alpha=0.25,
        label="middle 80 % of the bootstrap",
    )
    right.plot(compute, best_n, color="#4477AA", label=f"law: N ~ C^{study.law.exponent:.2f}")
    if len(study.minima[0]):
        right.plot(*study.minima[:2], "s", color="#EE6677", label="lowest points of parabolas")
    right.set(xscale="log", yscale="log", xlabel="compute (FLOPs)", ylabel="best number of parameters")
    right.legend(fontsize=8)
    left.legend(fontsize=8, loc="upper right")
    return figure


def _guesses(axes: Axes, study: ScalingStudy, x: object) -> None:
    for i, guess in enumerate((*study.held_out, study.next_size)):
        at = study.k * guess.n * guess.d
        reach = [[max(guess.loss - guess.low, 0)], [max(guess.high - guess.loss, 0)]]
        label = "foretold (not fitted), middle 80 %" if i == 0 else None
        axes.errorbar(
            [at], [guess.loss], reach, fmt="D", color="#222222", markerfacecolor="none", capsize=3, label=label
        )
        if guess.measured is not None:
            axes.plot([at], [guess.measured], "*", color="#AA3377", markersize=11, label="measured" if i == 0 else None)


def _scale(figure: Figure, axes: Axes, runs: Sequence[RunRecord]) -> None:
    """The bar that says what the colours mean."""
    if scale := score_range(runs):
        far = [
            score
            for run in runs
            if (score := run.score) is not None and abs(score - scale[0]) > abs(scale[1] - scale[0])
        ]
        least, (low, high) = scale[0] <= scale[1], sorted(scale)
        map_ = ScalarMappable(Normalize(low, high), _map() if least else _map().reversed())
        figure.colorbar(
            map_, ax=axes, label=runs[0].goal.axis_title, extend="neither" if not far else "max" if least else "min"
        )


def _map() -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("best to worst", SCALE)


def plain_text(text: str) -> str:
    """A text that matplotlib takes for no formula, on one line, not too long; what its font cannot show is left out."""
    short = "".join(c for c in text if c.isprintable() and not 0xD800 <= ord(c) < 0xE000)[:40]
    return short.replace("$", r"\$").lstrip("_") or "?"
