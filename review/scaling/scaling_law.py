"""Scaling law of loss over model size and tokens: fit, bootstrap, compute-optimal frontier.

    L(N, D) = E + A / N^alpha + B / D^beta        (Hoffmann et al. 2022, "Chinchilla", approach 3)

N is the number of parameters, the embedding included, as in that paper; D the tokens trained on; L held-out nats per
token; E the irreducible loss. Compute is C = k * N * D FLOPs, where k is what the models themselves report (6 if
attention is negligible). All functions are pure.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

HUBER_DELTA = 1e-3
"""Residuals of log L beyond this count linearly, as in the paper, so that an outlier has little weight."""
STARTS = tuple(
    itertools.product(
        (0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), *2 * ((0, 0.5, 1, 1.5, 2),)
    )
)
"""The paper's grid of initial values (log A, log B, log E, alpha, beta)."""
DESCENTS = 40
"""So many of STARTS, those of lowest cost, are optimised; the others end in the same minima or in worse ones."""
BOUNDS = ((-5, 40), (-5, 40), (-12, 5), (0, 3), (0, 3))


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: Floats | float, d: Floats | float) -> Floats:
        """Held-out nats per token of models with ``n`` parameters after ``d`` tokens."""
        return np.asarray(self.E + self.A * np.power(n, -self.alpha) + self.B * np.power(d, -self.beta))

    @property
    def exponent(self) -> float:
        """a in N_opt ~ C^a: growth of the compute-optimal size with compute; the tokens grow with 1 - a."""
        return self.beta / max(self.alpha + self.beta, 1e-12)

    def frontier(self, compute: Floats | float, k: float = 6.0) -> tuple[Floats, Floats]:
        """(N, D) of the lowest loss at ``compute`` = k * N * D FLOPs."""
        product = np.asarray(compute) / k
        n = (self.alpha * self.A / (self.beta * self.B) * product**self.beta) ** (1 / (self.alpha + self.beta))
        return n, product / n


def fit_law(n: Floats, d: Floats, loss: Floats, initial: ScalingLaw | None = None) -> ScalingLaw:
    """Fits the law to runs (n, d, loss), each of shape (R,): best of many L-BFGS descents on the Huber loss of log L.

    ``initial`` replaces the paper's grid of starts by one law, for resampled runs whose law is close to it.
    """
    log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)
    starts = np.array(STARTS, float)
    if initial is not None:
        starts = np.array([(*np.log((initial.A, initial.B, initial.E)), initial.alpha, initial.beta)], float)
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
    """Laws fitted to resampled runs, whose spread is the uncertainty; without draws of fewer than three sizes."""
    rng = np.random.default_rng(0)
    laws = []
    for _ in range(draws):
        pick = rng.integers(0, len(n), len(n))
        if len(np.unique(n[pick])) >= 3 and len(np.unique(d[pick])) >= 3:
            laws.append(fit_law(n[pick], d[pick], loss[pick], law))
    return laws


def isoflop_minima(
    n: Floats, compute: Floats, loss: Floats, tolerance: float = 0.1
) -> tuple[Floats, Floats, float | None]:
    """IsoFLOP minima (approach 2 of the paper), independent of the fit: a parabola of loss over log N at each budget.

    Budgets within ``tolerance`` of one another are merged. Returns the budgets whose parabola has its minimum inside
    the sizes tried, the N there, and the exponent of N over C (None with fewer than two such budgets).
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
    """(low, high) that enclose the middle ``share`` of the values."""
    low, high = np.quantile(values, ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)


def _cost(x: Floats, log_n: Floats, log_d: Floats, log_loss: Floats) -> tuple[float, Floats]:
    """Sum of the Huber loss of log L at x = (log A, log B, log E, alpha, beta), and its gradient, of shape (5,)."""
    a, b, e, alpha, beta = x
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    residual = top + np.log(total) - log_loss
    shares /= total
    inside = np.abs(residual) <= HUBER_DELTA
    cost = np.where(inside, residual**2 / 2, HUBER_DELTA * (np.abs(residual) - HUBER_DELTA / 2)).sum()
    slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA) * shares
    gradient = np.array([slope[0].sum(), slope[1].sum(), slope[2].sum(), -(slope[0] @ log_n), -(slope[1] @ log_d)])
    # Squares are about 1e-6: without rescaling, L-BFGS stops at its start.
    return float(cost / HUBER_DELTA**2), gradient / HUBER_DELTA**2
