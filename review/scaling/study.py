"""A scaling study from run folders: the law of all but the largest size, and how well it foretold that one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from review.run_reader import RunRecord
from review.scaling.isoflop_plan import model_cost
from review.scaling.scaling_law import Floats, ScalingLaw, bootstrap_laws, central_interval, fit_law, isoflop_minima
from train.config import load as configuration
from train.data.tokenizer import load_tokenizer
from train.errors import UserError

LEAST_SIZES, LEAST_RUNS = 3, 7
"""To fit five numbers."""
NEXT_COMPUTE_FACTOR = 3.0
"""The next size is foretold for so many times the largest compute that was spent."""


@dataclass(frozen=True)
class StudyPoint:
    """A finished run as the law sees it: parameters, tokens, FLOPs, held-out nats per token."""

    name: str
    n: int
    d: int
    compute: float
    loss: float


@dataclass(frozen=True)
class LossPrediction:
    """A loss that the law foretells, with the middle 80 % of its bootstrap; ``measured`` where the run was made."""

    name: str
    n: float
    d: float
    loss: float
    low: float
    high: float
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of the measurement."""
        return None if self.measured is None else self.loss / self.measured - 1


@dataclass(frozen=True)
class ScalingStudy:
    """A law, what it rests on, and what it foretells."""

    fitted: tuple[StudyPoint, ...]
    law: ScalingLaw
    draws: tuple[ScalingLaw, ...]
    k: float
    """FLOPs per parameter and token: the median of the fitted runs."""
    held_out: tuple[LossPrediction, ...]
    """The largest size, measured, and no part of the fit."""
    next_size: LossPrediction
    """A size that is not trained yet, on the frontier."""
    minima: tuple[Floats, Floats, float | None]
    """Approach 2: the budgets, the best N of each, the exponent."""

    def interval_of(self, name: str) -> tuple[float, float]:
        """The middle 80 % of one of the law's numbers."""
        return central_interval(np.array([getattr(law, name) for law in self.draws]))


def study_points(runs: Sequence[RunRecord]) -> list[StudyPoint]:
    """The finished runs that can be measured: those whose model still builds."""
    found = []
    for run in runs:
        loss, tokens = run.val_loss, run.tokens
        if run.state != "done" or not loss or not tokens:
            continue
        with contextlib.suppress(UserError, RuntimeError, ValueError, ArithmeticError, OSError):
            config = configuration.read(run.folder / "config.yaml")
            n, flops = model_cost(config, config.model.vocab_size or load_tokenizer(run.folder).vocab_size)
            found.append(StudyPoint(run.name, n, int(tokens), flops * tokens, loss))
    return found


def fit_study(runs: Sequence[RunRecord]) -> ScalingStudy | None:
    """The study that these runs make up: those of the corpus and sequence length that most have. None where they are no study.

    Where the runs without the largest size suffice for a fit, that size is foretold and compared; else all are fitted.
    """
    alike: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        if run.state == "done":
            alike.setdefault((run.corpus, str(run.config.get("batch.seq_len"))), []).append(run)
    candidates = max(alike.values(), key=len, default=[])
    if len({run.summary.get("params") for run in candidates}) < LEAST_SIZES:
        return None  # before torch is asked to build anything
    known = sorted(study_points(candidates), key=lambda p: (p.n, p.compute))
    if not _suffice(known):
        return None
    smaller = [p for p in known if p.n < known[-1].n]
    used = smaller if _suffice(smaller) else known
    n, d, compute, loss = (np.array([getattr(p, key) for p in used], float) for key in ("n", "d", "compute", "loss"))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        law = fit_law(n, d, loss)
        draws = bootstrap_laws(n, d, loss, law)
        minima = isoflop_minima(n, compute, loss)
    k = float(np.median(compute / n / d))
    held_out = tuple(_guess(law, draws, p.name, p.n, p.d, p.loss) for p in known if p not in used)
    best_n, best_d = law.frontier(NEXT_COMPUTE_FACTOR * max(p.compute for p in known), k)
    further = _guess(law, draws, "next", float(best_n), float(best_d))
    return ScalingStudy(tuple(used), law, tuple(draws), k, held_out, further, minima)


def report_lines(found: ScalingStudy) -> list[str]:
    """The study in lines of plain text."""
    law = found.law
    names = ("E", "alpha", "beta")
    spread = {name: "{:.3f} to {:.3f}".format(*found.interval_of(name)) for name in (*names, "exponent")}
    minima = "" if found.minima[2] is None else f"; by parabolas (approach 2) N ~ C^{found.minima[2]:.3f}"
    lines = [
        f"L(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}, from {len(found.fitted)} runs; "
        "N counts all parameters, D tokens, L held-out nats per token",
        "middle 80 % of the bootstrap: " + ", ".join(f"{name} {spread[name]}" for name in names),
        f"compute-optimal: N ~ C^{law.exponent:.3f} ({spread['exponent']}), D ~ C^{1 - law.exponent:.3f}; C = {found.k:.2f} N D "
        f"FLOPs{minima}",
    ]
    for guess in found.held_out:
        lines.append(
            f"{guess.name} (N = {guess.n:,.0f}, D = {guess.d:,.0f}; not fitted): foretold {guess.loss:.4f} "
            f"({guess.low:.4f} to {guess.high:.4f}), measured {guess.measured:.4f}, off by {guess.error:+.2%}"
        )
    ahead = found.next_size
    lines.append(
        f"next, at {NEXT_COMPUTE_FACTOR:g} times the compute: N = {ahead.n:.3g}, D = {ahead.d:.3g}, foretold {ahead.loss:.4f} "
        f"({ahead.low:.4f} to {ahead.high:.4f})"
    )
    return lines


def _suffice(known: Sequence[StudyPoint]) -> bool:
    return (
        len(known) >= LEAST_RUNS
        and len({p.n for p in known}) >= LEAST_SIZES
        and len({p.d for p in known}) >= LEAST_SIZES
    )


def _guess(
    law: ScalingLaw, draws: Sequence[ScalingLaw], name: str, n: float, d: float, measured: float | None = None
) -> LossPrediction:
    low, high = central_interval(np.array([float(draw.loss(n, d)) for draw in draws]))
    return LossPrediction(name, n, d, float(law.loss(n, d)), low, high, measured)
