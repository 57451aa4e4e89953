"""Scaling law: known laws are recovered by two independent methods, and the frontier is optimal."""

from __future__ import annotations

import numpy as np
import pytest

from review.scaling import scaling_law as laws
from review.scaling.scaling_law import ScalingLaw

CHINCHILLA = ScalingLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""As published (Hoffmann et al. 2022, equation 10)."""


def runs(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, L) of five sizes around the best one, at each of four budgets."""
    n, d = [], []
    for compute in (6e18, 6e19, 6e20, 3e21):
        best, _ = law.frontier(compute)
        for factor in (0.25, 0.5, 1, 2, 4):
            n.append(float(best) * factor)
            d.append(compute / 6 / n[-1])
    sizes, tokens = np.array(n), np.array(d)
    return sizes, tokens, law.loss(sizes, tokens) * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))


def test_fit_recovers_a_known_law():
    fitted = laws.fit_law(*runs(CHINCHILLA))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fitted, name) == pytest.approx(getattr(CHINCHILLA, name), rel=1e-3), name


def test_fit_of_noisy_losses_predicts_and_interval_holds_truth():
    n, d, loss = runs(CHINCHILLA, noise=0.002)
    fitted = laws.fit_law(n, d, loss)
    assert fitted.exponent == pytest.approx(CHINCHILLA.exponent, abs=0.03)
    draws = laws.bootstrap_laws(n, d, loss, fitted, draws=60)
    low, high = laws.central_interval(np.array([law.exponent for law in draws]), 0.98)
    assert low < CHINCHILLA.exponent < high
    assert high - low < 0.1
    assert float(fitted.loss(7e10, 1.4e12)) == pytest.approx(float(CHINCHILLA.loss(7e10, 1.4e12)), rel=0.01)


def test_isoflop_minima_give_the_exponent_of_the_fit():
    n, d, loss = runs(CHINCHILLA)
    budgets, best, exponent = laws.isoflop_minima(n, 6 * n * d, loss)
    assert exponent == pytest.approx(CHINCHILLA.exponent, abs=0.03)
    assert best == pytest.approx(CHINCHILLA.frontier(budgets)[0], rel=0.2)


def test_isoflop_minimum_outside_the_sizes_tried_is_left_out():
    n = np.array([1e8, 2e8, 4e8])
    assert laws.isoflop_minima(n, np.full(3, 1e20), np.array([3.0, 2.9, 2.8]))[2] is None
    assert len(laws.isoflop_minima(n, np.full(3, 1e20), np.array([3.0, 2.9, 2.8]))[0]) == 0


def test_frontier_is_the_best_split_of_a_budget():
    sizes = np.geomspace(1e7, 1e11, 4001)
    for compute, k in ((1e19, 6.0), (1e21, 7.5)):
        tried = sizes[np.argmin(CHINCHILLA.loss(sizes, compute / k / sizes))]
        n, d = CHINCHILLA.frontier(compute, k)
        assert float(n) == pytest.approx(tried, rel=5e-3)
        assert k * float(n) * float(d) == pytest.approx(compute)


def test_fit_is_robust_to_one_outlier():
    n, d, loss = runs(CHINCHILLA)
    loss[7] *= 1.2
    assert float(laws.fit_law(n, d, loss).loss(1e10, 1e11)) == pytest.approx(
        float(CHINCHILLA.loss(1e10, 1e11)), rel=5e-3
    )


def test_gradient_of_the_cost_equals_finite_differences():
    n, d, loss = map(np.log, runs(CHINCHILLA, noise=0.01))
    x = np.array([5.5, 6.2, 0.4, 0.33, 0.29])
    _, gradient = laws._cost(x, n, d, loss)
    for i, step in enumerate(1e-6 * np.eye(5)):
        slope = (laws._cost(x + step, n, d, loss)[0] - laws._cost(x - step, n, d, loss)[0]) / 2e-6
        assert gradient[i] == pytest.approx(slope, rel=1e-4)
