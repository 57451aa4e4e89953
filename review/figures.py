"""PNG figures of a review for documents and slides, drawn by matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")  # draws to files and needs no display
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

EARLY_LINE: dict[str, Any] = {"color": "#B5B5B5", "linewidth": 0.8, "alpha": 0.8}
TICK_TEXT: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "fontsize": 7, "va": "center"}
TICK_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
LINE_STYLES = {"solid": "-", "dash": "--"}
X_LABELS = {"steps": "optimizer steps", "tokens": "tokens trained on", "seconds": "seconds of training"}
MAX_POINTS, MAX_BARS = 1500, 40
"""Of a curve; of the goodput figure."""


def write_figures(
    runs: Sequence[RunRecord], importances: ImportanceReport | None, study: ScalingStudy | None, folder: Path
) -> list[Path]:
    """Writes every figure that the runs have data for into ``folder``; returns the files."""
    drawn: dict[str, Figure | None] = {f"loss_{x}": plot_curves(runs, x, "loss") for x in X_LABELS}
    drawn |= {"throughput": plot_curves(runs, "steps", "tokens_per_s"), "goodput": plot_goodput(runs)}
    drawn |= {
        "search": plot_search(search_history(runs), runs),
        "parallel": plot_parallel(runs),
        "importance": plot_importance(importances, runs),
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
    """Metric ``y`` over ``x`` for every run with metrics; with the loss also the held-out loss, as points."""
    styled = [(run, *style) for run, style in zip(runs, line_styles(runs), strict=True) if len(run.steps)]
    if not styled:
        return None
    many, held_out = len(runs) > MAX_DISTINCT, y == "loss"
    if many:  # what is drawn last, the best, lies on top
        order = {id(run): i for i, (_, run) in enumerate(ranked_runs(runs))}
        styled.sort(key=lambda item: -order.get(id(item[0]), len(runs)))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, color, dash in styled:
        at, values = (run.steps if x == "steps" else run.columns[x]), moving_average(run.columns[y], 0.05)
        kept = extreme_indices([values], MAX_POINTS)
        kept = kept[np.isfinite(values[kept])]
        width, label = 0.9 if many else 1.2, plain_text(run.legend_label)
        axes.plot(at[kept], values[kept], color=color, linestyle=LINE_STYLES[dash], linewidth=width, label=label)
        held = np.flatnonzero(np.isfinite(run.columns["val_loss"]) & held_out)
        edge, size = ("none", 3.5) if many else ("black", 5)
        axes.plot(
            at[held],
            run.columns["val_loss"][held],
            "o",
            color=color,
            markersize=size,
            markeredgecolor=edge,
            markeredgewidth=0.6,
        )
    axes.set(xlabel=X_LABELS[x], ylabel="loss (nats per token)" if held_out else "tokens per second, all workers")
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
        _add_color_bar(figure, axes, runs)
    return figure


def plot_goodput(runs: Sequence[RunRecord]) -> Figure | None:
    """Shares of the wall time of all starts by cause, one bar for each run."""
    measured = [(run, parts) for run in runs if (parts := time_shares(run))]
    rows = measured[:MAX_BARS]
    if not rows:
        return None
    causes = list(dict.fromkeys(itertools.chain.from_iterable(parts for _, parts in rows)))
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
    axes.set_title(f"the first {MAX_BARS} of {len(measured)} runs" if len(measured) > MAX_BARS else "", fontsize=9)
    axes.set(xlabel="% of the wall time of all starts", xlim=(0, 100))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_parallel(runs: Sequence[RunRecord]) -> Figure | None:
    """Parallel coordinates: a line for each run, an axis for each key that differs and, last, for each goal."""
    coordinates, scale = parallel_coordinates(runs), score_range(runs)
    if coordinates is None or scale is None:
        return None
    names = coordinates.axes
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(names) + 1), 4.5), layout="constrained")
    early = any(run.state != "done" for run in coordinates.runs)
    for run, values in reversed(
        list(zip(coordinates.runs, coordinates.values, strict=True))
    ):  # what is drawn last, the best, lies on top
        row = [axis_position(axis, value) for axis, value in zip(names, values, strict=False)]
        graded: dict[str, Any] = {
            "color": scale_color(scale_position(run.score or 0.0, scale)),
            "linewidth": 1.4,
            "alpha": 0.9,
        }
        axes.plot(range(len(row)), row, **(graded if run.state == "done" else EARLY_LINE))
    for i, axis in enumerate(names):
        axes.axvline(i, color="#888888", linewidth=0.8)
        for at, text in axis.ticks:
            axes.annotate(plain_text(text), (i, at), bbox=TICK_BOX, **TICK_TEXT)
    axes.set_xticks(range(len(names)), [plain_text(axis.key) for axis in names], rotation=20, ha="right", fontsize=8)
    axes.set(yticks=[], xlim=(-0.1, len(names) - 0.75))
    axes.set_title("grey: trials that ended early" if early else "", fontsize=9)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    _add_color_bar(figure, axes, runs)
    return figure


def plot_search(history: SearchHistory | None, runs: Sequence[RunRecord]) -> Figure | None:
    """The score of each trial of a sweep in their order, and the best so far."""
    if history is None:
        return None
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for kind in dict.fromkeys(dot.kind for dot in history.dots):
        dots = [dot for dot in history.dots if dot.kind == kind]
        at = [dot.number for dot in dots]
        colors = [dot.color for dot in dots]
        axes.scatter(at, [dot.shown for dot in dots], c=colors, marker=dots[0].marker, s=34, label=kind, zorder=3)
    if history.best:
        axes.plot(
            *zip(*history.best, strict=True), drawstyle="steps-post", color="#444444", linewidth=1, label="best so far"
        )
    axes.set(xlabel="trial", ylabel=runs[0].goal.axis_title, ylim=history.range)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def plot_importance(importances: ImportanceReport | None, runs: Sequence[RunRecord]) -> Figure | None:
    """Permutation importance of keys, with the middle 80 % of the draws as whiskers."""
    if importances is None:
        return None
    keys = importances.keys[:15][::-1]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.4 * len(keys)), layout="constrained")
    means = np.array([key.mean for key in keys])
    reach = np.array([(max(key.mean - key.low, 0), max(key.high - key.mean, 0)) for key in keys]).T
    axes.barh([plain_text(key.key) for key in keys], means, xerr=reach, color="#4477AA", ecolor="#444444", capsize=3)
    axes.set_xlabel(f"error of prediction when the key is shuffled ({runs[0].goal.unit})")
    axes.set_title(
        f"{importances.runs} runs; the forest explains {max(importances.explained, 0):.0%} of unseen runs' variance",
        fontsize=9,
    )
    return figure


def plot_scaling(study: ScalingStudy | None) -> Figure | None:
    """Loss over compute with the law's curves, frontier and predictions; and the best size over compute."""
    if study is None:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = sorted({p.n for p in study.fitted})
    low, high = min(p.compute for p in study.fitted), study.k * study.next_size.n * study.next_size.d
    compute = np.geomspace(low / 1.5, high * 1.3, 100)
    for n, color in zip(sizes, _map()(np.linspace(0.1, 0.95, len(sizes))), strict=True):
        mine = [p for p in study.fitted if p.n == n]
        at = [p.compute for p in mine]
        losses = [p.loss for p in mine]
        left.plot(at, losses, "o", color=color, label=f"{n:,} parameters")
        span = np.geomspace(mine[0].compute / 1.3, mine[-1].compute * 1.3, 50)
        left.plot(span, study.law.loss(n, span / study.k / n), "-", color=color, linewidth=1)
    best_n, best_d = study.law.frontier(compute, study.k)
    left.plot(compute, study.law.loss(best_n, best_d), "k--", linewidth=1, label="frontier")
    _plot_predictions(left, study)
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


def _plot_predictions(axes: Axes, study: ScalingStudy) -> None:
    for i, prediction in enumerate((*study.held_out, study.next_size)):
        at = study.k * prediction.n * prediction.d
        reach = [[max(prediction.loss - prediction.low, 0)], [max(prediction.high - prediction.loss, 0)]]
        label = "foretold (not fitted), middle 80 %" if i == 0 else None
        axes.errorbar(
            [at], [prediction.loss], reach, fmt="D", color="#222222", markerfacecolor="none", capsize=3, label=label
        )
        if prediction.measured is not None:
            axes.plot(
                [at], [prediction.measured], "*", color="#AA3377", markersize=11, label="measured" if i == 0 else None
            )


def _add_color_bar(figure: Figure, axes: Axes, runs: Sequence[RunRecord]) -> None:
    """Adds the color bar of the score, pointed at the end where scores lie beyond it."""
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
    """A text safe for matplotlib: no formula, no unprintable characters, at most 40 characters; "?" if empty."""
    short = "".join(c for c in text if c.isprintable() and not 0xD800 <= ord(c) < 0xE000)[:40]
    return short.replace("$", r"\$").lstrip("_") or "?"
