"""The sampler: cached equals uncached, a batch equals its rows, every stop, and the distributions it draws from."""

import pytest
import torch

from train import schema
from train.errors import UserError
from train.generate import choose, generate, probabilities
from train.objectives import build_objective

EOT = 256


def options(**keys):
    return schema.Generation.model_validate({"prompts": [], "temperature": 0.0, "max_tokens": 12} | keys)


@pytest.fixture(params=["gpt_tiny", "llama_tiny"])
def model(request, make_config):
    """Weights large enough for text that varies, in float64 for comparisons to be exact in effect."""
    objective = build_objective(make_config(request.param, init_std=0.3, max_len=40), 257)
    return objective.double().eval()


def uncached(model, prompt, count):
    """Greedy text by a full forward pass for each token."""
    tokens = list(prompt)
    for _ in range(count):
        T = len(tokens)
        batch = {
            "tokens": torch.tensor([tokens]),
            "positions": torch.arange(T)[None],
            "segments": torch.ones(1, T, dtype=torch.int32),
        }
        tokens.append(int(model.logits(batch)[0, -1].argmax()))
        if tokens[-1] == EOT:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


PROMPTS = [[1, 2, 3], [7], list(range(20)), [200, 100, 0, 9, 9]]


def test_cached_logits_equal_those_of_a_full_pass(model):
    tokens = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([4, 9, 1])
    batch = {"positions": torch.arange(20).expand(3, -1), "segments": torch.ones(3, 20, dtype=torch.int32)}
    with torch.no_grad():
        full = model.logits(batch | {"tokens": tokens})
        logits, state = model.prefill(tokens[:, :9], lengths, 20)
        for step in range(8):
            ends = lengths - 1 + step
            assert torch.allclose(logits, full[torch.arange(3), ends], atol=1e-10)
            logits, state = model.decode(tokens[torch.arange(3), ends + 1], state)


def test_greedy_text_equals_the_uncached_one_and_a_batch_its_rows(model):
    texts = generate(model, PROMPTS, options(), EOT)
    assert texts == [uncached(model, prompt, 12) for prompt in PROMPTS]
    assert texts == [generate(model, [prompt], options(), EOT)[0] for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) > 1


def test_it_stops_at_the_longest_sequence_and_says_so(model):
    reasons = {}
    texts = generate(model, [list(range(37)), [5], list(range(40))], options(max_tokens=9), EOT, on_stop=reasons.__setitem__)
    assert [len(text) for text in texts] == [3, 9, 0]
    assert reasons == {0: "max_len", 1: "max_tokens", 2: "max_len"}
    assert texts[1] == uncached(model, [5], 9), "a row that is done does not disturb the others"
    with pytest.raises(UserError, match=r"prompt 1 has 41 tokens.*40"):
        generate(model, [[1], list(range(41))], options(), EOT)


def test_it_stops_at_the_end_of_text_which_is_not_returned(model):
    text = generate(model, [[1, 2, 3]], options(), EOT)[0]
    reasons, seen = {}, []
    end = text[4]
    cut = generate(model, [[1, 2, 3]], options(), end, lambda row, token: seen.append(token), reasons.__setitem__)[0]
    assert cut == seen == text[: text.index(end)]
    assert reasons == {0: "eot"}


def test_nothing_asked_for_is_nothing_done(model):
    assert generate(model, [], options(), EOT) == []
    assert generate(model, [[1]], options(max_tokens=0), EOT) == [[]]


def test_an_empty_prompt_starts_a_document(model):
    assert generate(model, [[]], options(), EOT) == generate(model, [[EOT]], options(), EOT)


def test_samples_are_a_function_of_seed_and_row(model):
    sampled = options(temperature=1.0, seed=1, max_tokens=8)
    first = generate(model, [[1]] * 3, sampled, EOT)
    torch.manual_seed(5)
    assert first == generate(model, [[1]] * 3, sampled, EOT)
    assert len({tuple(text) for text in first}) == 3
    assert first[0] == generate(model, [[1]], sampled, EOT)[0]
    assert first != generate(model, [[1]] * 3, options(temperature=1.0, seed=2, max_tokens=8), EOT)


def test_temperature_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def probs(**keys):
        return probabilities(logits, options(**{"temperature": 1.0, **keys}))[0].tolist()

    assert probs() == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert probs(temperature=0.5) == pytest.approx([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])
    assert probs(top_k=2) == pytest.approx([0.625, 0.375, 0, 0])
    assert probs(top_k=9) == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert probs(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0])
    assert probs(top_p=0.9) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert probs(top_p=1e-6) == pytest.approx([1, 0, 0, 0])
    assert probs(top_k=3, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0])


def test_draws_follow_the_probabilities_and_never_take_a_token_of_none():
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]]).log()
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    drawn = choose(logits.expand(1000, -1), options(temperature=1.0), grid)
    assert [drawn.count(token) for token in range(6)] == [0, 500, 0, 300, 200, 0]
    ends = choose(logits.expand(2, -1), options(temperature=1.0), [0.0, 1 - 2**-53])
    assert ends == [1, 4]
