"""A scaling study from run folders: a law fitted to all but the largest size, which it predicts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from review.lenient_io import finite_number
from review.run_reader import RunRecord
from review.scaling.isoflop_plan import model_cost
from review.scaling.scaling_law import Floats, ScalingLaw, bootstrap_laws, central_interval, fit_law, isoflop_minima
from train.config import load as configuration
from train.data.tokenizer import load_tokenizer
from train.errors import UserError
from train.util.run_layout import RunDir

MIN_SIZES, MIN_FITTED_RUNS = 3, 7
"""Distinct sizes (and distinct token counts), and runs, that a fit of five numbers needs."""
NEXT_COMPUTE_FACTOR = 3.0
"""The next size is predicted at so many times the largest compute of the runs."""


@dataclass(frozen=True)
class StudyPoint:
    """A finished run as the law sees it: parameters n, tokens d, FLOPs, held-out nats per token."""

    name: str
    n: int
    d: int
    compute: float
    loss: float


@dataclass(frozen=True)
class LossPrediction:
    """A predicted loss with the middle 80 % of its bootstrap, and the ``measured`` one if there is a run."""

    name: str
    n: float
    d: float
    loss: float
    low: float
    high: float
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """Relative error of the prediction; None if not measured."""
        return None if self.measured is None else self.loss / self.measured - 1


@dataclass(frozen=True)
class ScalingStudy:
    """A fitted law, the runs it was fitted to, its uncertainty, and its predictions."""

    fitted: tuple[StudyPoint, ...]
    law: ScalingLaw
    draws: tuple[ScalingLaw, ...]
    """Bootstrap."""
    k: float
    """FLOPs per parameter and token: the median of the fitted runs."""
    held_out: tuple[LossPrediction, ...]
    """Runs of the largest size, measured but not fitted."""
    next_size: LossPrediction
    """A size on the frontier that is not trained yet."""
    minima: tuple[Floats, Floats, float | None]
    """IsoFLOP minima (approach 2): budgets, best N of each, exponent."""

    def interval_of(self, name: str) -> tuple[float, float]:
        """The middle 80 % of one of the law's numbers, such as alpha, over the bootstrap."""
        return central_interval(np.array([getattr(law, name) for law in self.draws]))


def study_points(runs: Sequence[RunRecord]) -> list[StudyPoint]:
    """The finished runs with a held-out loss whose model can still be built."""
    points = []
    for run in runs:
        loss, tokens = run.val_loss, run.tokens
        if run.state != "done" or not loss or not tokens:
            continue
        with contextlib.suppress(UserError, RuntimeError, ValueError, ArithmeticError, OSError):
            config = configuration.read(RunDir(run.folder).config)
            n, flops = model_cost(config, config.model.vocab_size or load_tokenizer(run.folder).vocab_size)
            points.append(StudyPoint(run.name, n, int(tokens), flops * tokens, loss))
    return points


def fit_study(runs: Sequence[RunRecord]) -> ScalingStudy | None:
    """Fits the law to the runs of the most common corpus and sequence length. None if they are too few or too alike.

    If the runs without the largest size suffice for a fit, that size is predicted and compared; else all are fitted.
    """
    alike: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        if run.state == "done":
            alike.setdefault((run.corpus, str(run.config.get("batch.seq_len"))), []).append(run)
    candidates = max(alike.values(), key=len, default=[])
    if len({finite_number(run.summary.get("params")) for run in candidates}) < MIN_SIZES:
        return None  # before any model is built
    known = sorted(study_points(candidates), key=lambda p: (p.n, p.compute))
    if not _can_fit(known):
        return None
    smaller = [p for p in known if p.n < known[-1].n]
    used = smaller if _can_fit(smaller) else known
    n, d, compute, loss = np.array([(p.n, p.d, p.compute, p.loss) for p in used], float).T.copy()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        law = fit_law(n, d, loss)
        draws = bootstrap_laws(n, d, loss, law)
        minima = isoflop_minima(n, compute, loss)
    k = float(np.median(compute / n / d))
    held_out = tuple(_predict(law, draws, p.name, p.n, p.d, p.loss) for p in known if p not in used)
    best_n, best_d = law.frontier(NEXT_COMPUTE_FACTOR * max(p.compute for p in known), k)
    further = _predict(law, draws, "next", float(best_n), float(best_d))
    return ScalingStudy(tuple(used), law, tuple(draws), k, held_out, further, minima)


def report_lines(study: ScalingStudy) -> list[str]:
    """The law, its uncertainty and its predictions, in lines of plain text."""
    law = study.law
    names = ("E", "alpha", "beta")
    spread = {name: "{:.3f} to {:.3f}".format(*study.interval_of(name)) for name in (*names, "exponent")}
    minima = "" if study.minima[2] is None else f"; by parabolas (approach 2) N ~ C^{study.minima[2]:.3f}"
    lines = [
        f"L(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}, "
        f"from {len(study.fitted)} runs; N counts all parameters, D tokens, L held-out nats per token",
        "middle 80 % of the bootstrap: " + ", ".join(f"{name} {spread[name]}" for name in names),
        f"compute-optimal: N ~ C^{law.exponent:.3f} ({spread['exponent']}), D ~ C^{1 - law.exponent:.3f}; "
        f"C = {study.k:.2f} N D FLOPs{minima}",
    ]
    for prediction in study.held_out:
        lines.append(
            f"{prediction.name} (N = {prediction.n:,.0f}, D = {prediction.d:,.0f}; not fitted): "
            f"foretold {prediction.loss:.4f} "
            f"({prediction.low:.4f} to {prediction.high:.4f}), "
            f"measured {prediction.measured:.4f}, off by {prediction.error:+.2%}"
        )
    ahead = study.next_size
    lines.append(
        f"next, at {NEXT_COMPUTE_FACTOR:g} times the compute: N = {ahead.n:.3g}, D = {ahead.d:.3g}, "
        f"foretold {ahead.loss:.4f} ({ahead.low:.4f} to {ahead.high:.4f})"
    )
    return lines


def _can_fit(known: Sequence[StudyPoint]) -> bool:
    return (
        len(known) >= MIN_FITTED_RUNS
        and len({p.n for p in known}) >= MIN_SIZES
        and len({p.d for p in known}) >= MIN_SIZES
    )


def _predict(
    law: ScalingLaw, draws: Sequence[ScalingLaw], name: str, n: float, d: float, measured: float | None = None
) -> LossPrediction:
    low, high = central_interval(np.array([float(draw.loss(n, d)) for draw in draws]))
    return LossPrediction(name, n, d, float(law.loss(n, d)), low, high, measured)
