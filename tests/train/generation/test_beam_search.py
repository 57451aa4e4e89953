"""Tests of beam search against exhaustive search, on a model with four tokens."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import schema
from train.generation.beam_search import beam_search
from train.generation.sample_loop import generate
from train.models.generation_api import Generative
from train.util import seeding

V, EOT = 4, 0


@dataclass
class History:
    """Decoding state: all tokens of each row so far."""

    tokens: list[list[int]]

    def rows(self, index):
        return History([list(self.tokens[i]) for i in index.tolist()])


class Table(torch.nn.Module):
    """A model whose next logits are a random function of (seed, all tokens before)."""

    def __init__(self, seed, *, continues=True, max_len=99):
        super().__init__()
        self.device_marker = torch.nn.Parameter(torch.zeros(()))  # the sampler reads the device of a parameter
        self.seed, self.continues, self.max_len = seed, continues, max_len

    def logits(self, tokens):
        return 2 * seeding.generator(self.seed, tokens).standard_normal(V)

    def prefill(self, tokens, lengths, capacity):
        state = History([row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)])
        return self.next_logits(state), state

    def decode(self, token, state):
        state = History([[*row, t] for row, t in zip(state.tokens, token.tolist(), strict=True)])
        return self.next_logits(state), state

    def next_logits(self, state):
        return torch.tensor(np.array([self.logits(row) for row in state.tokens]))


def options(**keys):
    return schema.GenerationConfig.model_validate({"prompts": [], "temperature": 0.0} | keys)


def exhaustive(model, prompt, length, penalty):
    """Every text of at most ``length`` tokens with its score, best first: [(score, tokens without the final EOT)]."""
    scored = []
    for n in range(1, length + 1):
        for text in itertools.product(range(V), repeat=n):
            if EOT in text[:-1] or (n < length and text[-1] != EOT):
                continue
            total = 0.0
            for at in range(n):
                logits = model.logits([*prompt, *text[:at]])
                total += logits[text[at]] - np.log(np.exp(logits).sum())
            scored.append((total / n**penalty, [t for t in text if t != EOT]))
    return sorted(scored, reverse=True)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.0, 0.6, 1.0, 2.0, -0.5]))
def test_wide_beams_equal_exhaustive_search(seed, length, penalty):
    model, prompts = Table(seed), [[1, 2], [3], [2, 2, 2, 1]]
    results = beam_search(model, prompts, options(max_tokens=length, beams=3**4, n=5, length_penalty=penalty), EOT)
    for prompt, texts in zip(prompts, results, strict=True):
        expected = exhaustive(model, prompt, length, penalty)[:5]
        scores, tokens = zip(*expected, strict=True)
        assert [text.tokens for text in texts] == list(tokens)
        assert [text.score for text in texts] == pytest.approx(scores)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_narrow_beams_give_true_scores_independent_of_batch(seed, beams):
    model, prompts, beam_options = Table(seed), [[1], [2, 3, 1]], options(max_tokens=4, beams=beams, n=beams)
    results = beam_search(model, prompts, beam_options, EOT)
    assert results == [beam_search(model, [prompt], beam_options, EOT)[0] for prompt in prompts]
    for prompt, texts in zip(prompts, results, strict=True):
        true_scores = {tuple(tokens): score for score, tokens in exhaustive(model, prompt, 4, 1.0)}
        scores = [text.score for text in texts]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([true_scores[tuple(text.tokens)] for text in texts])


def test_beam_text_ends_where_stopped_returns_true():
    model, beam_options = Table(5), options(max_tokens=4, beams=3**4, n=3**4)
    [texts] = beam_search(model, [[1]], beam_options, EOT, lambda prompt, tokens: tokens[-1] == 3)
    stopped = [text.tokens for text in texts if text.reason == "stop"]
    assert stopped
    assert all(tokens[-1] == 3 and 3 not in tokens[:-1] for tokens in stopped)
    assert all(3 not in text.tokens for text in texts if text.reason != "stop")


@pytest.mark.parametrize("find", [generate, beam_search])
def test_answer_may_fill_max_len_whatever_the_prompt_length(find):
    model = Table(1, continues=False, max_len=6)
    assert isinstance(model, Generative)
    never = V + 1
    results = find(model, [[1] * 6, [2]], options(max_tokens=9, beams=2 if find is beam_search else 1), never)
    assert [(len(several[0].tokens), several[0].reason) for several in results] == [(6, "max_len")] * 2
    penalised = find(
        model, [[1]], options(max_tokens=3, repetition_penalty=1e9, beams=2 if find is beam_search else 1), never
    )
    assert len(set(penalised[0][0].tokens)) == 3
