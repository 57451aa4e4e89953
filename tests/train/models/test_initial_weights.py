"""Tests of the weights of new models: any range of a parameter is the same numbers, however it is asked for."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.models import initial_weights
from train.models.initial_weights import BLOCK, InitialWeights, draw_normal
from train.objectives import build_objective
from train.util import seeding


@given(size=st.integers(1, 700), cuts=st.lists(st.integers(0, 700), max_size=4))
def test_any_division_into_ranges_gives_the_same_numbers(size, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_weights, "BLOCK", 64)
        whole = draw_normal(3, "some.weight", size, slice(0, size))
        ends = sorted({0, size, *(min(cut, size) for cut in cuts)})
        parts = [draw_normal(3, "some.weight", size, slice(*pair)) for pair in pairwise(ends)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert len(np.unique(whole)) == size, "two blocks have the same numbers"


def test_parameters_of_one_block_have_the_weights_of_earlier_versions():
    drawn = draw_normal(7, "backbone.embed.weight", BLOCK, slice(BLOCK - 50, BLOCK))
    whole = seeding.generator(7, "init", "backbone.embed.weight").standard_normal((BLOCK // 64, 64), np.float32)
    assert np.array_equal(drawn, whole.reshape(-1)[-50:])


@pytest.mark.parametrize("model", ["gpt_tiny", "t5_tiny", "bert_tiny", "lstm_tiny"])
def test_a_module_on_meta_gives_the_weights_of_a_whole_one(make_config, model):
    objectives = {"t5_tiny": {"name": "seq2seq"}, "bert_tiny": {"name": "masked"}}
    config = make_config(model, **({"objective": objectives[model]} if model in objectives else {}))
    with torch.device("meta"):
        described = build_objective(config, 257)
    weights = InitialWeights(described, config.seed)
    for name, parameter in build_objective(config, 257).named_parameters():
        size, third = parameter.numel(), -(-parameter.numel() // 3)
        parts = [weights.read(name, at, min(third, size - at)) for at in range(0, size, third)]
        assert torch.equal(torch.cat(parts), parameter.detach().flatten()), name
