"""Learning rates worked out by hand."""

import pytest

from train.config.schema import ScheduleConfig
from train.optim.schedule import learning_rate, warmup_steps


def rates(steps, at, **keys):
    return [learning_rate(ScheduleConfig(**keys), 1.0, step, steps) for step in at]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_warmup_is_linear_from_the_first_step(name):
    assert rates(100, [0, 1, 2, 3], name=name, warmup=4) == [0.25, 0.5, 0.75, 1.0]
    assert rates(100, [0], name=name) == [1.0]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_learning_rate_is_proportional_to_its_peak(name):
    schedule = ScheduleConfig(name=name, warmup=3, final=0.1)
    for step in (0, 2, 7, 19):
        assert learning_rate(schedule, 6e-4, step, 20) == pytest.approx(6e-4 * learning_rate(schedule, 1.0, step, 20))


def test_constant_schedule_stays_at_the_peak():
    assert rates(10, [0, 5, 9], name="constant") == [1, 1, 1]


def test_linear_schedule_falls_on_a_straight_line():
    assert rates(11, [0, 5, 8, 10], name="linear", final=0.2) == pytest.approx([1, 0.6, 0.36, 0.2])
    assert rates(14, [3, 8, 13], name="linear", warmup=4, final=0.0) == pytest.approx([1, 0.5, 0])


def test_cosine_schedule_falls_on_half_a_cosine():
    # 1 - (1 - cos(pi * x)) / 2 * 0.9 at x = 0, 1/4, 1/2, 1
    wanted = [1, 1 - 0.14644660940672624 * 0.9, 0.55, 0.1]
    assert rates(9, [0, 2, 4, 8], name="cosine", final=0.1) == pytest.approx(wanted)
    assert rates(12, [3, 5, 7, 11], name="cosine", warmup=4, final=0.1) == pytest.approx(wanted)


def test_inverse_sqrt_schedule_falls_with_the_root_of_steps():
    assert rates(1000, [3, 15, 99], name="inverse_sqrt", warmup=4) == pytest.approx([1, 0.5, 0.2])
    assert rates(1000, [0, 3, 99], name="inverse_sqrt") == pytest.approx([1, 0.5, 0.1])


def test_wsd_schedule_is_stable_then_decays():
    keys = {"name": "wsd", "warmup": 2, "decay": 0.4, "final": 0.2}
    assert rates(10, range(10), **keys) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates(10, [8, 9], name="wsd", decay=0.0) == [1, 1]
    assert rates(5, range(5), name="wsd", decay=1.0, warmup=1) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_warmup_is_a_number_or_a_fraction_of_steps():
    assert warmup_steps(ScheduleConfig(name="cosine", warmup=1), 1000) == 1
    assert warmup_steps(ScheduleConfig(name="cosine", warmup=1.0), 1000) == 1000
    assert warmup_steps(ScheduleConfig(name="cosine", warmup=0.02), 1000) == 20


def test_single_step_and_warmup_over_all_steps_are_legal():
    for name in ("constant", "linear", "cosine", "inverse_sqrt", "wsd"):
        assert rates(1, [0], name=name) == [1.0]
        assert rates(3, range(3), name=name, warmup=4) == [0.25, 0.5, 0.75]
