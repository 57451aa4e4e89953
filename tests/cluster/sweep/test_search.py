"""Searches: samplers, pruners, and a search restored from a ledger, which equals the unbroken one."""

from __future__ import annotations

import math

import pytest

from cluster.sweep.search import TrialSearch, refuse_useless_values
from train.config import load as configuration

SPACE = ["optimizer.lr=tag(log,interval(1e-4,1e-1))", "optimizer.weight_decay=interval(0,0.3)"]


def search(*words: str) -> TrialSearch:
    return TrialSearch(configuration.load_sweep([*words, "steps=80", "eval_every=10"]))


def measure(params) -> float:
    return (math.log10(float(params["optimizer.lr"])) + 2.5) ** 2 + float(params.get("optimizer.weight_decay", 0))


def run_trials(study: TrialSearch, trials: int) -> list[dict[str, str]]:
    tried = []
    for _ in range(trials):
        number, params, _ = study.suggest()
        study.record_end(number, "done", [measure(params)] * len(study.study.directions))
        tried.append(params)
    return tried


@pytest.mark.parametrize(
    "words", [["sweep=tpe"], ["sweep=random"], ["sweep=cmaes"], ["sweep=nsga2", "sweep.metric=[a,b]"]], ids=str
)
def test_search_restored_from_the_ledger_suggests_as_the_unbroken_one(words):
    whole, study, known = search(*words, *SPACE), search(*words, *SPACE), []
    expected = run_trials(whole, 14)
    for _ in range(9):
        number, params, attrs = study.suggest()
        known.append((params, dict(attrs)))
        study.record_end(number, "done", [measure(params)] * len(study.study.directions))
    again = search(*words, *SPACE)
    for number, (params, attrs) in enumerate(known):
        again.restore(params, attrs, [])
        again.record_end(number, "done", [measure(params)] * len(again.study.directions))
    assert [params for params, _ in known] + run_trials(again, 5) == expected
    assert len({str(params) for params in expected}) > 10  # NSGA-II may keep a whole parent


def test_tpe_comes_closer_to_the_optimum_than_its_first_trials():
    tried = [measure(params) for params in run_trials(search("sweep=tpe", *SPACE), 40)]
    assert min(tried[20:]) < min(tried[:5])


def test_suggestions_stay_within_ranges_and_keep_choices_as_typed():
    words = [
        "model.layers=range(2,9,3)",
        "optimizer.lr=interval(1e-3,2e-3)",
        "model=gpt_tiny,llama_tiny",
        "batch.global=int(interval(4,6))",
    ]
    tried = run_trials(search("sweep=random", *words), 30)
    assert {p["model.layers"] for p in tried} == {"2", "5", "8"}
    assert {p["model"] for p in tried} == {"gpt_tiny", "llama_tiny"}
    assert {p["batch.global"] for p in tried} == {"4", "5", "6"}
    assert all(1e-3 <= float(p["optimizer.lr"]) <= 2e-3 for p in tried)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_pruner_ends_a_bad_trial_and_not_a_good_one(pruner):
    study = search("sweep=random", f"sweep.pruner={pruner}", *SPACE)

    def run(level: float) -> int:
        number, _, _ = study.suggest()
        for step in range(10, 80, 10):
            if study.report(number, step, level - step / 100):
                study.record_end(number, "pruned", None)
                return step
        study.record_end(number, "done", [level])
        return 80

    first = [run(3.0 + n / 10) for n in range(5)]
    assert first[0] == 80
    assert run(9.0) == 10
    assert run(2.0) == 80


def test_restored_trial_stands_on_the_rungs_that_it_had_reached():
    study, again = (search("sweep=random", "sweep.pruner=asha", *SPACE) for _ in range(2))
    reports = [(step, 3.0) for step in range(10, 80, 10)]
    number, params, _ = study.suggest()
    assert not any(study.report(number, *report) for report in reports)
    again.restore(params, {}, reports)
    assert not again.report(0, 70, 9.0), "a step that is known already is not judged again"
    for known in (study, again):
        known.suggest()
        assert [known.report(1, step, 3.5) for step in (10, 20)] == [True, False], (
            "of two the better one, and only at a rung"
        )


def test_asha_keeps_a_third_at_one_eighth_and_half_of_those_at_one_half():
    study = search("sweep=random", "sweep.pruner=asha", *SPACE)
    ended = {10: 0, 40: 0}
    for n in range(40):
        number, _, _ = study.suggest()
        early, late = (n * 17) % 40, (n * 11) % 40  # each level once, in no order; another one from the half on
        ends = [
            step for step in (10, 20, 30, 40, 50, 60, 70) if study.report(number, step, early if step < 40 else late)
        ]
        ended |= {ends[0]: ended[ends[0]] + 1} if ends else {}
        study.record_end(number, "pruned" if ends else "done", None if ends else [late])
    assert set(ended) == {10, 40}
    assert 22 <= ended[10] <= 30
    assert (40 - ended[10]) / 4 <= ended[40] <= (40 - ended[10]) * 3 / 4


def test_asha_finishes_the_best_of_many_and_few_others():
    study = search("sweep=random", "sweep.pruner=asha", *SPACE)
    done = []
    for n in range(40):
        number, _, _ = study.suggest()
        level = (n * 17) % 40  # each level once, in no order
        ends = any(study.report(number, step, level - step / 10) for step in (10, 20, 30, 40, 50, 60, 70))
        study.record_end(number, "pruned" if ends else "done", None if ends else [level])
        done += [] if ends else [level]
    assert len(done) < 20
    assert study.study.best_value == 0


def test_tpe_starts_with_points_spread_evenly_over_the_space():
    words = [
        "sweep=tpe",
        "sweep.startup=8",
        "optimizer.lr=tag(log,interval(1e-4,1))",
        "model.layers=range(2,10)",
        "zero=0,1",
    ]
    first, other = (run_trials(search(*words, f"sweep.seed={seed}"), 8) for seed in (0, 1))
    assert first != other
    for tried in (first, other):
        assert {int(math.log10(float(p["optimizer.lr"])) + 4) for p in tried} == {0, 1, 2, 3}, (
            "every order of magnitude"
        )
        assert len({int(p["model.layers"]) // 2 for p in tried}) >= 3
        assert {p["zero"] for p in tried} == {"0", "1"}
    assert search("sweep=tpe", "sweep.trials=40", *SPACE).startup == 8


def test_value_that_makes_sense_in_no_trial_of_a_search_is_refused():
    search = ["sweep=tpe", "batch.micro=4,5", "batch.global=16"]
    sweep = configuration.load_sweep(search)
    with pytest.raises(configuration.ConfigError, match=r"^batch.micro=5, one of its values: .*set batch.micro=4"):
        refuse_useless_values(sweep, lambda config: configuration.with_workers(config, 2))
    with pytest.raises(configuration.ConfigError, match=r"^model.heads=7, one of its values: .*does not divide"):
        refuse_useless_values(configuration.load_sweep(["sweep=tpe", "model.heads=2,7"]), lambda c: c)


def test_value_that_makes_sense_in_some_trial_of_a_search_is_taken():
    sweep = configuration.load_sweep(["sweep=tpe", "batch.micro=4,8", "batch.global=4,16", "cluster.workers=1"])
    refuse_useless_values(sweep, lambda config: config)
