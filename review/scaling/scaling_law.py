"""The loss of a model as a law of its size and its tokens: fitted, trusted so far, and solved for the best use of compute.

    L(N, D) = E + A / N^alpha + B / D^beta        (Hoffmann et al. 2022, "Chinchilla", approach 3)

N is the number of parameters, the embedding included, as in that paper; D the tokens trained on; L held-out nats per token. E is
what no model of the kind can remove. All functions are pure. Compute is C = k * N * D FLOPs, k being what the models
themselves report (6 where attention is negligible).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

HUBER = 1e-3
"""Residuals of log L beyond this count linearly: the paper's, so that a bad run pulls little."""
STARTS = tuple(
    itertools.product(
        (0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), *2 * ((0, 0.5, 1, 1.5, 2),)
    )
)
"""(log A, log B, log E, alpha, beta) from which the paper descends."""
DESCENTS = 40
"""Of those, the ones that start lowest are descended from; the rest end in the same valleys or in worse ones."""
BOUNDS = ((-5, 40), (-5, 40), (-12, 5), (0, 3), (0, 3))


@dataclass(frozen=True)
class ScalingLaw:
    """The five numbers of the law."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: Floats | float, d: Floats | float) -> Floats:
        """Held-out nats per token of models of ``n`` parameters after ``d`` tokens."""
        return np.asarray(self.E + self.A * np.power(n, -self.alpha) + self.B * np.power(d, -self.beta))

    @property
    def exponent(self) -> float:
        """a in N_opt ~ C^a: how the best size grows with compute; tokens grow with 1 - a."""
        return self.beta / max(self.alpha + self.beta, 1e-12)

    def frontier(self, compute: Floats | float, k: float = 6.0) -> tuple[Floats, Floats]:
        """(N, D) of least loss among those that cost ``compute`` = k * N * D FLOPs."""
        product = np.asarray(compute) / k
        n = (self.alpha * self.A / (self.beta * self.B) * product**self.beta) ** (1 / (self.alpha + self.beta))
        return n, product / n


def fit_law(n: Floats, d: Floats, loss: Floats, near: ScalingLaw | None = None) -> ScalingLaw:
    """The law of runs of (n, d, loss), each an array (R,): the best of many descents on the Huber loss of log L.

    ``near``: a law to start from, in place of the paper's grid; for resampled runs, whose law is not far.
    """
    log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)
    known = [] if near is None else [(*np.log((near.A, near.B, near.E)), near.alpha, near.beta)]
    starts = np.array(known or STARTS, float)
    costs = np.array([_cost(start, log_n, log_d, log_loss)[0] for start in starts])
    ends = [
        minimize(
            _cost,
            start,
            (log_n, log_d, log_loss),
            "L-BFGS-B",
            jac=True,
            bounds=BOUNDS,
            options={"maxiter": 2000, "ftol": 1e-13},
        )
        for start in starts[np.argsort(costs, kind="stable")[:DESCENTS]]
    ]
    a, b, e, alpha, beta = min(ends, key=lambda end: float(end.fun)).x
    return ScalingLaw(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), float(alpha), float(beta))


def bootstrap_laws(n: Floats, d: Floats, loss: Floats, law: ScalingLaw, draws: int = 200) -> list[ScalingLaw]:
    """Laws of runs drawn with replacement: their spread is the uncertainty. Draws with fewer than three sizes are left out."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        pick = rng.integers(0, len(n), len(n))
        if len(np.unique(n[pick])) >= 3 and len(np.unique(d[pick])) >= 3:
            found.append(fit_law(n[pick], d[pick], loss[pick], law))
    return found


def isoflop_minima(
    n: Floats, compute: Floats, loss: Floats, tolerance: float = 0.1
) -> tuple[Floats, Floats, float | None]:
    """Approach 2 of the paper, an independent way: at each budget a parabola of loss over log N has its lowest point.

    Budgets within ``tolerance`` of one another are one. Returns the budgets that have a lowest point inside the sizes
    tried, the N there, and the exponent of N over C (None where fewer than two budgets have one).
    """
    order = np.argsort(compute)
    groups = np.split(order, np.flatnonzero(np.diff(np.log(compute[order])) > tolerance) + 1)
    budgets, best = [], []
    for group in groups:
        x = np.log(n[group])
        if len(np.unique(x)) < 3:
            continue
        bend, slope, _ = np.polyfit(x, loss[group], 2)
        lowest = -slope / (2 * bend) if bend > 0 else np.inf
        if x.min() <= lowest <= x.max():
            budgets.append(float(np.exp(np.log(compute[group]).mean())))
            best.append(float(np.exp(lowest)))
    exponent = float(np.polyfit(np.log(budgets), np.log(best), 1)[0]) if len(budgets) >= 2 else None
    return np.array(budgets), np.array(best), exponent


def central_interval(values: Floats, share: float = 0.8) -> tuple[float, float]:
    """The middle ``share`` of values."""
    low, high = np.quantile(values, ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)


def _cost(x: Floats, log_n: Floats, log_d: Floats, log_loss: Floats) -> tuple[float, Floats]:
    """The summed Huber loss of log L at x = (log A, log B, log E, alpha, beta), and its gradient."""
    a, b, e, alpha, beta = x
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    residual = top + np.log(total) - log_loss
    shares /= total
    inside = np.abs(residual) <= HUBER
    cost = np.where(inside, residual**2 / 2, HUBER * (np.abs(residual) - HUBER / 2)).sum()
    slope = np.clip(residual, -HUBER, HUBER) * shares
    gradient = np.array([slope[0].sum(), slope[1].sum(), slope[2].sum(), -(slope[0] @ log_n), -(slope[1] @ log_d)])
    # The scale of the squares is 1e-6: without this, L-BFGS takes the start for the end.
    return float(cost / HUBER**2), gradient / HUBER**2
