"""A scaling study from run folders: the law of all but the largest size, and how well it foretold that one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from review.run_reader import Run
from review.scaling.isoflop_plan import cost
from review.scaling.scaling_law import Floats, Law, bootstrap, fit, interval, parabolas
from train.config import load as configuration
from train.data.tokenizer import load_tokenizer
from train.errors import UserError
from train.util.run_layout import RunDir

LEAST_SIZES, LEAST_RUNS = 3, 7
"""To fit five numbers."""
LEAP = 3.0
"""The next size is foretold for so many times the largest compute that was spent."""


@dataclass(frozen=True)
class Point:
    """A finished run as the law sees it: parameters, tokens, FLOPs, held-out nats per token."""

    name: str
    n: int
    d: int
    compute: float
    loss: float


@dataclass(frozen=True)
class Guess:
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
class Study:
    """A law, what it rests on, and what it foretells."""

    fitted: tuple[Point, ...]
    law: Law
    draws: tuple[Law, ...]
    k: float
    """FLOPs per parameter and token: the median of the fitted runs."""
    held_out: tuple[Guess, ...]
    """The largest size, measured, and no part of the fit."""
    further: Guess
    """A size that is not trained yet, on the frontier."""
    budgets: tuple[Floats, Floats, float | None]
    """Approach 2: the budgets, the best N of each, the exponent."""

    def spread(self, name: str) -> tuple[float, float]:
        """The middle 80 % of one of the law's numbers."""
        return interval(np.array([getattr(law, name) for law in self.draws]))


def points(runs: Sequence[Run]) -> list[Point]:
    """The finished runs that can be measured: those whose model still builds."""
    found = []
    for run in runs:
        loss, tokens = run.val_loss, run.tokens
        if run.state != "done" or not loss or not tokens:
            continue
        with contextlib.suppress(UserError, RuntimeError, ValueError, ArithmeticError, OSError):
            config = configuration.read(RunDir(run.folder).config)
            n, flops = cost(config, config.model.vocab_size or load_tokenizer(run.folder).vocab_size)
            found.append(Point(run.name, n, int(tokens), flops * tokens, loss))
    return found


def study(runs: Sequence[Run]) -> Study | None:
    """The study that these runs make up: those of the corpus and sequence length that most have. None where they are no study.

    Where the runs without the largest size suffice for a fit, that size is foretold and compared; else all are fitted.
    """
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.state == "done":
            alike.setdefault((run.corpus, str(run.config.get("batch.seq_len"))), []).append(run)
    candidates = max(alike.values(), key=len, default=[])
    if len({run.summary.get("params") for run in candidates}) < LEAST_SIZES:
        return None  # before torch is asked to build anything
    known = sorted(points(candidates), key=lambda p: (p.n, p.compute))
    if not _suffice(known):
        return None
    smaller = [p for p in known if p.n < known[-1].n]
    used = smaller if _suffice(smaller) else known
    n, d, compute, loss = (np.array([getattr(p, key) for p in used], float) for key in ("n", "d", "compute", "loss"))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        law = fit(n, d, loss)
        draws = bootstrap(n, d, loss, law)
        minima = parabolas(n, compute, loss)
    k = float(np.median(compute / n / d))
    held_out = tuple(_guess(law, draws, p.name, p.n, p.d, p.loss) for p in known if p not in used)
    best_n, best_d = law.frontier(LEAP * max(p.compute for p in known), k)
    further = _guess(law, draws, "next", float(best_n), float(best_d))
    return Study(tuple(used), law, tuple(draws), k, held_out, further, minima)


def report(found: Study) -> list[str]:
    """The study in lines of plain text."""
    law = found.law
    names = ("E", "alpha", "beta")
    spread = {name: "{:.3f} to {:.3f}".format(*found.spread(name)) for name in (*names, "exponent")}
    minima = "" if found.budgets[2] is None else f"; by parabolas (approach 2) N ~ C^{found.budgets[2]:.3f}"
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
    ahead = found.further
    lines.append(
        f"next, at {LEAP:g} times the compute: N = {ahead.n:.3g}, D = {ahead.d:.3g}, foretold {ahead.loss:.4f} "
        f"({ahead.low:.4f} to {ahead.high:.4f})"
    )
    return lines


def _suffice(known: Sequence[Point]) -> bool:
    return (
        len(known) >= LEAST_RUNS
        and len({p.n for p in known}) >= LEAST_SIZES
        and len({p.d for p in known}) >= LEAST_SIZES
    )


def _guess(law: Law, draws: Sequence[Law], name: str, n: float, d: float, measured: float | None = None) -> Guess:
    low, high = interval(np.array([float(draw.loss(n, d)) for draw in draws]))
    return Guess(name, n, d, float(law.loss(n, d)), low, high, measured)
