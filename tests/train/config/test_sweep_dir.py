"""The Pareto order that a sweep's driver and the review share, and the names of trial folders."""

from __future__ import annotations

from pathlib import Path

from train.config.sweep_dir import dominates, pareto_front, trial_dir


def test_a_point_dominates_only_if_nowhere_worse_and_somewhere_better():
    assert dominates([1.0, 2.0], [1.0, 3.0])
    assert not dominates([1.0, 2.0], [1.0, 2.0])
    assert not dominates([1.0, 3.0], [2.0, 2.0])


def test_pareto_front_keeps_every_point_that_no_other_dominates_in_order():
    points = {"a": [3.0, 1.0], "b": [1.0, 3.0], "c": [3.0, 3.0], "d": [1.0, 3.0]}
    assert pareto_front(points) == ["a", "b", "d"]
    assert pareto_front({}) == []


def test_trial_folders_have_numbers_of_three_digits_or_more():
    assert trial_dir(Path("sweeps/x"), 7) == Path("sweeps/x/007")
    assert trial_dir(Path("sweeps/x"), 1234) == Path("sweeps/x/1234")
