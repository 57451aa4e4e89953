"""Tests that each generative family equals a twin that recomputes everything for each token."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from train.config import schema
from train.generation.beam_search import beam_search
from train.generation.sample_loop import generate
from train.models.generation_api import Generative
from train.objectives import build_objective

EOT, START = 256, 255


@dataclass
class TokensSoFar:
    """Decoding state of the twin: the prompt and the written tokens of each row."""

    prompts: list[list[int]]
    written: list[list[int]]

    def rows(self, index):
        prompts = [self.prompts[i] for i in index]
        return TokensSoFar(prompts, [list(self.written[i]) for i in index])


class Stateless(torch.nn.Module):
    """The twin of a model: uses its ``logits`` alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.continues, self.max_len = model, model.continues, model.max_len

    def prefill(self, tokens, lengths, capacity):
        prompts = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        state = TokensSoFar(prompts, [[] for _ in lengths])
        return self.next_logits(state), state

    def decode(self, token, state):
        state = TokensSoFar(state.prompts, [[*row, t] for row, t in zip(state.written, token.tolist(), strict=True)])
        return self.next_logits(state), state

    def next_logits(self, state):
        batches = map(self.batch, state.prompts, state.written)
        return torch.stack([self.model.logits(batch)[0, -1] for batch in batches])

    def batch(self, prompt, written):
        read = [*prompt, *written] if self.continues else prompt[:-1]
        tokens = torch.tensor([read])
        batch = {"tokens": tokens, "positions": torch.arange(len(read))[None], "segments": torch.ones_like(tokens)}
        target = torch.tensor([[*prompt[-1:], *written]])
        return batch | {"target_tokens": target, "target_segments": torch.ones_like(target)}


@pytest.fixture(params=["gpt_tiny", "llama_tiny", "rnn_tiny", "lstm_tiny", "gru_tiny", "t5_tiny", "transformer_tiny"])
def model(request, make_config):
    """A float64 model, so that comparisons are exact in effect, with weights large enough for text that varies."""
    objective = build_objective(make_config(request.param, init_std=0.3), 257).double().eval()
    assert isinstance(objective, Generative)
    return objective


def options(**keys):
    return schema.GenerationConfig.model_validate({"prompts": [], "temperature": 0.0, "max_tokens": 9} | keys)


def tokens_and_reason(text):
    return text.tokens, text.reason


PROMPTS = [[1, 2, 3, START], [7, START], [*range(20), START], [200, 100, 0, 9, 9, START]]


@pytest.mark.parametrize(
    ("find", "keys"),
    [
        (generate, {"repetition_penalty": 1.2}),
        (generate, {"temperature": 1.5, "n": 2, "top_k": 100, "top_p": 0.95}),
        (beam_search, {"beams": 3, "n": 3, "length_penalty": 0.6}),
    ],
    ids=["greedy", "drawn", "beams"],
)
def test_cached_text_equals_text_without_a_state_and_prompts_alone(model, find, keys):
    with torch.no_grad():
        cached = find(model, PROMPTS, options(**keys), EOT)
        twin = find(Stateless(model), PROMPTS, options(**keys), EOT)
        alone = [find(model, [prompt], options(**keys), EOT)[0] for prompt in PROMPTS]
    for others in (twin, alone):
        for expected, actual in zip(others, cached, strict=True):
            assert list(map(tokens_and_reason, actual)) == list(map(tokens_and_reason, expected))
    assert len({tuple(text.tokens) for text in itertools.chain(*cached)}) > 1
