"""Stages of a mixture in steps, and what a resumed run may change of them."""

import pytest

from train.config import load as configuration
from train.config.keys.mixture import StageConfig
from train.data.mixing.stages import continued_stages, describe_stages, resolved_stages
from train.errors import UserError

SIZES = {"a": 3000, "b": 1000}


def resolve(*keys: str, sources: str = "{a: {dir: a}, b: {dir: b}}", steps: int = 100) -> list[StageConfig]:
    given = [] if any(key.startswith("data.sources=") for key in keys) else [f"data.sources={sources}"]
    base = ["data=mix", *given, "model=gpt_tiny", f"steps={steps}", "cluster.workers=1"]
    return resolved_stages(configuration.load([*base, *keys]), SIZES)


def stage(until: int | None, a: float, b: float) -> StageConfig:
    return StageConfig(until=until, weights={"a": a, "b": b})


def test_ends_are_steps_and_weights_are_shares():
    given = "data.stages=[{until: 0.25, weights: {a: 1}}, {until: 60, weights: {b: 3, a: 1}}, {weights: {a: 1, b: 1}}]"
    assert resolve(given) == [stage(25, 1, 0), stage(60, 0.25, 0.75), stage(None, 0.5, 0.5)]


def test_resolved_stages_stay_as_they_are():
    resolved = [stage(25, 0.33333, 0.66667), stage(None, 1, 0)]
    given = "data.stages=[{until: 25, weights: {a: 0.33333, b: 0.66667}}, {weights: {a: 1}}]"
    assert resolve(given) == resolved
    assert resolve(given, steps=900) == resolved


def test_without_stages_the_weights_of_the_sources_hold_to_the_end():
    assert resolve(sources="{a: {dir: a, weight: 9}, b: {dir: b, weight: 1}}") == [stage(None, 0.9, 0.1)]
    assert resolve() == [stage(None, 0.75, 0.25)]
    assert resolve(sources="{a: {dir: a}, b: {dir: b, epochs: 9}}") == [stage(None, 0.25, 0.75)]


OLD = [stage(40, 1, 0), stage(None, 0.5, 0.5)]


def test_the_same_stages_go_on_without_a_word():
    assert continued_stages(OLD, OLD, 60, 100, reweight=False) == OLD


def test_a_stage_cut_in_two_is_one_stage():
    one, other = "{until: 20, weights: {a: 2}}", "{until: 40, weights: {a: 1, b: 0}}"
    assert resolve(f"data.stages=[{one}, {other}, {{weights: {{a: 3, b: 3}}}}]") == OLD


@pytest.mark.parametrize("new", [[stage(None, 0.5, 0.5)], [stage(30, 1, 0), stage(None, 0.5, 0.5)]])
def test_other_shares_need_a_word_that_says_so(new):
    with pytest.raises(UserError, match=r"a 1, b 0 to step 40; a 0.5, b 0.5 to the end.*data.reweight=true"):
        continued_stages(OLD, new, 60, 100, reweight=False)


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (20, [stage(20, 1, 0)]),
        (40, [stage(40, 1, 0)]),
        (60, [stage(40, 1, 0), stage(60, 0.5, 0.5)]),
    ],
)
def test_with_the_word_what_was_read_keeps_its_shares(step, kept):
    new = [stage(10, 0, 1), stage(80, 0.25, 0.75), stage(None, 0, 1)]
    merged = [*kept, stage(80, 0.25, 0.75), stage(None, 0, 1)]
    assert continued_stages(OLD, new, step, 100, reweight=True) == merged
    # The next start, from a later step or once more from this one, comes to the same.
    assert continued_stages(merged, new, step, 100, reweight=True) == merged
    assert continued_stages(merged, new, 90, 100, reweight=True)[: len(kept)] == kept


def test_a_run_that_has_read_nothing_takes_any_shares():
    assert continued_stages(OLD, [stage(None, 0, 1)], 0, 100, reweight=False) == [stage(None, 0, 1)]


def test_stages_are_told_in_words():
    assert describe_stages(OLD) == "a 1, b 0 to step 40; a 0.5, b 0.5 to the end"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.sources={}"], "data=mix needs its sources"),
        (["data.sources={a: {weight: 1}}"], "data.sources.a has nothing to read"),
        (["data.sources={a: {dir: x, paths: [y]}}"], "dir, and text beside it"),
        (["data.sources={a: {source: stdlib, paths: [y]}}"], "source: stdlib reads none"),
        (["data.sources={a: {dir: x, epochs: 2, tokens: 5}}"], "both epochs and tokens"),
        (["data.sources={a: {dir: x, weight: -1}}"], "data.sources.a.weight"),
        (["data.sources={a: {dir: x, weight: 0}}"], "all weights are 0"),
        (["data.sources={a: {dir: x, weight: 1}, b: {dir: y}}"], "data.sources.b has no weight"),
        (["data.sources={a: {dir: x, tokens: 5}}", "data.pack=false"], "rows are documents"),
        (["data.sources={a: {dir: x, wieght: 5}}"], "wieght"),
        (["data.stages=[{weights: {c: 1}}]"], "names 'c', which is none of data.sources"),
        (["data.stages=[{weights: {a: 0, b: 0}}]"], "all weights are 0"),
        (["data.stages=[{weights: {a: -2}}]"], "data.stages"),
        (
            ["data.stages=[{until: 30, weights: {a: 1}}, {until: 0.1, weights: {b: 1}}]"],
            "ends at step 10, and it begins",
        ),
        (["data.stages=[{until: 30, weights: {a: 1}}]"], "ends at step 30, and steps=100"),
        (["data.sources={a: {dir: x, weight: 1}}", "data.stages=[{weights: {a: 1}}]"], "leave one of them out"),
        (["data.paths=[x]"], "give each source its own"),
        (["model=lstm_tiny"], "set model.carry=false"),
        (["data.exhausted=never"], "data.exhausted"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused_in_words(keys, message):
    with pytest.raises(UserError) as refusal:
        resolve(*keys)
    assert message in str(refusal.value)


def test_keys_of_a_mixture_are_refused_without_one():
    with pytest.raises(UserError, match=r"data.exhausted has no effect with data.source=stdlib"):
        configuration.load(["data.exhausted=drop", "cluster.workers=1"])
