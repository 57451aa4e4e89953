"""The rule of what may be kept, as tables, on made-up curves, and across a checkpoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from train.config.schema import SpikesConfig
from train.data.sampling.batch_plan import Cursor
from train.state.loss_history import LEAST_RISE, LossHistory, diagnose_step, is_outlier, outlier_limit, row_limit
from train.state.train_state import TrainState

RULE = SpikesConfig(window=8, deviations=5)
QUIET = (2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1)


def test_outlier_limit_is_median_plus_robust_deviations():
    # median 2.0; distances from it .0 .1 .1 .0 .2 .2 .0 .1, whose median is .1
    assert LossHistory(QUIET).limit(RULE) == pytest.approx(2.0 + 5 * 0.14826)
    assert outlier_limit([3.0] * 8, 5) == 3.0 + LEAST_RISE
    assert LossHistory((*QUIET[:-1], 50.0)).limit(RULE) == pytest.approx(
        2.0 + 5 * 0.14826
    )  # one odd step moves nothing


def test_limit_is_infinite_without_full_window_or_with_spikes_unwatched():
    assert LossHistory(QUIET[:7]).limit(RULE) == math.inf
    assert LossHistory(QUIET).limit(RULE.model_copy(update={"watch": "nonfinite"})) == math.inf


@pytest.mark.parametrize(
    ("loss", "applied", "limit", "verdict"),
    [
        (2.0, True, 3.0, None),
        (3.0, True, 3.0, None),
        (3.1, True, 3.0, "spike"),
        (1e9, True, math.inf, None),
        (2.0, False, 3.0, "non-finite"),
        (math.nan, True, 3.0, "non-finite"),
        (math.inf, True, math.inf, "non-finite"),
        (9.0, False, 3.0, "non-finite"),
    ],
)
def test_diagnose_step_by_loss_update_and_limit(loss: float, applied: bool, limit: float, verdict: str | None):
    assert diagnose_step(loss, applied, limit) == verdict


def test_high_loss_enters_the_history_without_being_the_reference():
    recent = LossHistory(QUIET, Cursor(0, 7))
    assert recent.after(9.0, Cursor(0, 8), RULE) == LossHistory((*QUIET[1:], 9.0), Cursor(0, 7))
    assert recent.after(2.2, Cursor(0, 8), RULE) == LossHistory((*QUIET[1:], 2.2), Cursor(0, 8))
    assert recent.after(math.nan, Cursor(0, 8), RULE) is recent


def test_row_outliers_are_non_finite_rows_or_else_far_ones():
    rows = [2.0, 2.1, 1.9, 2.2, 30.0]
    assert [is_outlier(loss, row_limit(rows, 5)) for loss in rows] == [False] * 4 + [True]
    rows[0] = math.nan
    assert [is_outlier(loss, row_limit(rows, 5)) for loss in rows] == [True] + [False] * 4


def test_loss_history_survives_a_checkpoint_bit_for_bit():
    progress = TrainState()
    for n, loss in enumerate(np.random.default_rng(0).normal(3.0, 0.1, 20).tolist()):
        recent = progress.history.after(loss, progress.cursor, RULE)
        progress = TrainState(step=n + 1, cursor=Cursor(0, n + 1), history=recent)
        assert TrainState.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress


@pytest.mark.parametrize("noise", ["normal", "laplace", "student"])
def test_healthy_curves_are_seldom_high_and_a_broken_one_is_at_once(noise: str):
    """Warm-up, a steep fall and a plateau, with noise of light and heavy tails; what is suspected here costs a look, no
    more.
    """
    draw = np.random.default_rng(1)
    odd = {"normal": draw.normal, "laplace": draw.laplace, "student": lambda size: draw.standard_t(4, size)}[noise](
        size=3000
    )
    rule, recent, high = SpikesConfig(), LossHistory(), 0
    for n, error in enumerate(odd.tolist()):
        loss = 3.0 + 6.0 * math.exp(-n / 300) + 0.1 * error
        high += loss > recent.limit(rule)
        recent = recent.after(loss, Cursor(0, n), rule)
    assert high <= {"normal": 0, "laplace": 6, "student": 12}[noise]
    assert recent.limit(rule) < 4.6
