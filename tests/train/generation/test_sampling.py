"""Tests of sampling against the definitions, written out token by token in Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import schema
from train.generation.sampling import apply_repetition_penalty, choose_tokens, probabilities


def options(**keys):
    return schema.GenerationConfig.model_validate({"prompts": [], "temperature": 1.0} | keys)


def by_definition(logits, o):
    """The probabilities of one row of logits."""
    weights = [math.exp((x - max(logits)) / o.temperature) for x in logits]
    kept = set(range(len(logits)))
    if 0 < o.top_k < len(logits):
        kth = sorted(logits, reverse=True)[o.top_k - 1]
        kept = {i for i in kept if logits[i] >= kth}
    if o.top_p < 1:
        total, cumulative, first = sum(weights[i] for i in kept), 0.0, sorted(kept, key=lambda i: (-weights[i], i))
        kept = set()
        while cumulative / total < o.top_p and len(kept) < len(first):
            kept.add(first[len(kept)])
            cumulative += weights[first[len(kept) - 1]]
    most = max(weights[i] for i in kept)
    kept = {i for i in kept if weights[i] >= o.min_p * most}
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    st.integers(0, 13),
    st.sampled_from([1.0, 0.93, 0.61, 0.37, 1e-6]),
    st.sampled_from([0.0, 0.013, 0.21, 0.77, 1.0]),
)
def test_probabilities_equal_their_definition(numbers, temperature, top_k, top_p, min_p):
    o = options(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = [n * 0.137 for n in numbers]
    actual = probabilities(torch.tensor([logits, logits[::-1]], dtype=torch.float64), o)
    assert actual[0].tolist() == pytest.approx(by_definition(logits, o), abs=1e-12)
    assert actual[1].tolist() == pytest.approx(by_definition(logits[::-1], o), abs=1e-12)


def test_temperature_top_k_top_p_and_min_p_equal_values_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def probs(**keys):
        return probabilities(logits, options(**keys))[0].tolist()

    assert probs() == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert probs(temperature=0.5) == pytest.approx([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])
    assert probs(top_k=2) == pytest.approx([0.625, 0.375, 0, 0])
    assert probs(top_k=9) == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert probs(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0])
    assert probs(top_p=1e-6) == pytest.approx([1, 0, 0, 0])
    assert probs(top_k=3, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0])
    assert probs(min_p=0.5) == pytest.approx([0.625, 0.375, 0, 0])
    assert probs(min_p=1.0) == pytest.approx([1, 0, 0, 0])
    assert probs(temperature=0.5, min_p=0.5) == pytest.approx([1, 0, 0, 0]), (
        "the cut applies to probabilities after the temperature"
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=6, max_size=6),
    st.lists(st.lists(st.integers(0, 5)), min_size=2, max_size=2),
    st.floats(0.5, 2),
)
def test_repetition_penalty_equals_its_definition(scores, written, penalty):
    actual = apply_repetition_penalty(torch.tensor([scores, scores], dtype=torch.float64), written, penalty)
    for row, tokens in zip(actual.tolist(), written, strict=True):
        assert row == [x if i not in tokens else x / penalty if x > 0 else x * penalty for i, x in enumerate(scores)]


def test_draws_follow_probabilities_and_never_choose_weight_zero():
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]]).log()
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    drawn = choose_tokens(logits.expand(1000, -1), options(), grid)
    assert [drawn.count(token) for token in range(6)] == [0, 500, 0, 300, 200, 0]
    ends = choose_tokens(logits.expand(2, -1), options(), [0.0, 1 - 2**-53])
    assert ends == [1, 4]
    assert choose_tokens(logits.expand(2, -1), options(temperature=0.0), [0.9, 0.9]) == [1, 1]
