"""Tests of the sampler on real models: caches, batches, ends of texts, and equality with transformers."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from train.config import schema
from train.errors import UserError
from train.generation.beam_search import beam_search
from train.generation.sample_loop import generate
from train.models.generation_api import Generative
from train.objectives import build_objective

EOT = 256


def options(**keys):
    return schema.GenerationConfig.model_validate({"prompts": [], "temperature": 0.0, "max_tokens": 12} | keys)


def texts(continuations):
    """The tokens of the one text of each prompt."""
    assert all(len(of_prompt) == 1 for of_prompt in continuations)
    return [of_prompt[0].tokens for of_prompt in continuations]


@pytest.fixture(params=["gpt_tiny", "llama_tiny"])
def model(request, make_config):
    """A float64 model, so that comparisons are exact in effect, with weights large enough for text that varies."""
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


def without(tokens, eot):
    return [token for token in tokens if token != eot]


PROMPTS = [[1, 2, 3], [7], list(range(20)), [200, 100, 0, 9, 9]]


def test_objective_with_prefill_and_decode_is_generative(model):
    assert isinstance(model, Generative)
    assert not isinstance(model.backbone.embed, Generative)


def test_cached_logits_of_selected_rows_equal_full_forward_pass(model):
    tokens = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(0))
    lengths, rows = torch.tensor([4, 9, 1]), torch.arange(3)
    batch = {"positions": torch.arange(20).expand(3, -1), "segments": torch.ones(3, 20, dtype=torch.int32)}
    with torch.no_grad():
        full = model.logits(batch | {"tokens": tokens})
        logits, state = model.prefill(tokens[:, :9], lengths, 20)
        for step in range(8):
            ends = lengths[rows] - 1 + step
            assert torch.allclose(logits, full[rows, ends], atol=1e-10)
            if step == 3:  # reorder the rows: one twice, one not at all
                rows, index = torch.tensor([2, 0, 2]), torch.tensor([2, 0, 2])
                state, ends = state.rows(index), ends[index]
            logits, state = model.decode(tokens[rows, ends + 1], state)


def test_greedy_text_in_a_batch_equals_uncached_text_of_each_row(model):
    results = texts(generate(model, PROMPTS, options(), EOT))
    assert results == [uncached(model, prompt, 12) for prompt in PROMPTS]
    assert results == [texts(generate(model, [prompt], options(), EOT))[0] for prompt in PROMPTS]
    assert len({tuple(text) for text in results}) > 1


def test_generation_ends_at_max_len_with_that_reason(model):
    results = generate(model, [list(range(37)), [5], list(range(40))], options(max_tokens=9), EOT)
    assert [len(text) for text in texts(results)] == [3, 9, 0]
    assert [several[0].reason for several in results] == ["max_len", "max_tokens", "max_len"]
    assert texts(results)[1] == uncached(model, [5], 9), "a row that is done does not disturb the others"
    with pytest.raises(UserError, match=r"prompt 1 has 41 tokens.*40"):
        generate(model, [[1], list(range(41))], options(), EOT)


def test_generation_ends_at_eot_or_when_on_token_returns_true(model):
    text = texts(generate(model, [[1, 2, 3]], options(), EOT))[0]
    tokens_seen, end = [], text[4]
    [[cut]] = generate(model, [[1, 2, 3]], options(), end, lambda row, token: bool(tokens_seen.append(token)))
    assert cut.tokens == tokens_seen == text[: text.index(end)]
    assert cut.reason == "eot"
    stopped = generate(model, [[1, 2, 3], [7]], options(), EOT, lambda row, token: row == 0 and token == end)
    assert stopped[0][0].tokens == text[: text.index(end) + 1]
    assert stopped[0][0].reason == "stop"
    assert stopped[1] == generate(model, [[7]], options(), EOT)[0]


def test_generate_without_prompts_or_tokens_returns_empty_texts(model):
    assert generate(model, [], options(), EOT) == []
    for find in (generate, beam_search):
        [[nothing]] = find(model, [[1]], options(max_tokens=0, beams=2), EOT)
        assert (nothing.tokens, nothing.reason) == ([], "max_tokens")


def test_empty_prompt_starts_a_document(model):
    assert generate(model, [[]], options(), EOT) == generate(model, [[EOT]], options(), EOT)


def test_draw_depends_on_seed_prompt_and_number_not_on_batch(model):
    sampled = options(temperature=1.0, seed=1, max_tokens=8, n=3, top_k=50, repetition_penalty=1.2)
    several = generate(model, [[1]], sampled, EOT)
    torch.manual_seed(5)
    beside = generate(model, [[7, 8], [1], [9] * 20], sampled, EOT)
    assert beside[1] == several[0]
    assert len({tuple(text.tokens) for text in several[0]}) == 3
    alone = generate(
        model, [[1]], options(temperature=1.0, seed=1, max_tokens=8, top_k=50, repetition_penalty=1.2), EOT
    )
    assert alone[0] == several[0][:1]
    assert several != generate(model, [[1]], sampled.model_copy(update={"seed": 2}), EOT)


# equality with transformers


@pytest.fixture
def twins(make_config):
    """Our GPT-2 and transformers' with the same weights."""
    own_model = build_objective(make_config("gpt_tiny", init_std=0.3, max_len=40, vocab_size=257), 257).double().eval()
    model, weights = own_model.backbone.model, own_model.backbone.state_dict()
    sizes = {"n_layer": model.layers, "n_embd": model.width, "n_head": model.heads, "n_positions": model.max_len}
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=257, bos_token_id=EOT, eos_token_id=EOT, **sizes)).double().eval()
    names = {
        "wte": "embed",
        "wpe": "positions",
        "ln_f": "norm",
        "ln_1": "attention_norm",
        "ln_2": "mlp_norm",
        "h": "blocks",
    }
    names |= {"attn": "attention", "c_attn": "qkv", "attention.c_proj": "out", "c_fc": "up", "mlp.c_proj": "down"}
    for name, parameter in reference.transformer.named_parameters():
        parts = [names.get(part, part) for part in name.split(".")]
        parts = [names.get(f"{before}.{part}", part) for before, part in zip(["", *parts], parts, strict=False)]
        weight = weights[".".join(parts)]
        transposed = weight.ndim == 2 and "blocks" in parts
        parameter.data.copy_(weight.T if transposed else weight)
    return own_model, reference


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_transformers(twins, penalty):
    own_model, reference = twins
    for prompt in PROMPTS:
        [[continuation]] = generate(own_model, [prompt], options(repetition_penalty=penalty, max_tokens=15), EOT)
        tokens = torch.tensor([prompt])
        settings = {"max_new_tokens": 15, "do_sample": False, "repetition_penalty": penalty, "pad_token_id": EOT}
        results = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        assert continuation.tokens == without(results[0, len(prompt) :].tolist(), EOT)


@pytest.mark.parametrize(("length_penalty", "penalty"), [(1.0, 1.0), (0.0, 1.0), (2.5, 1.2), (-1.0, 1.0)])
def test_beams_equal_those_of_transformers(twins, length_penalty, penalty):
    own_model, reference = twins
    beam_options = options(beams=4, n=4, length_penalty=length_penalty, repetition_penalty=penalty, max_tokens=8)
    ends = generate(own_model, [[1, 2, 3]], options(max_tokens=8), EOT)[0][0].tokens[2:4]
    for eot in (EOT, *ends):
        for prompt, continuations in zip(PROMPTS, beam_search(own_model, PROMPTS, beam_options, eot), strict=True):
            tokens = torch.tensor([prompt])
            settings = {
                "num_beams": 4,
                "num_return_sequences": 4,
                "length_penalty": length_penalty,
                "repetition_penalty": penalty,
            }
            settings |= {
                "early_stopping": "never",
                "max_new_tokens": 8,
                "eos_token_id": eot,
                "pad_token_id": eot,
                "do_sample": False,
            }
            settings |= {"return_dict_in_generate": True, "output_scores": True}
            results = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
            expected = results.sequences[:, len(prompt) :].tolist()
            own_tokens = [text.tokens for text in continuations]
            assert own_tokens == [without(row, eot) for row in expected]
            assert [text.score for text in continuations] == pytest.approx(results.sequences_scores.tolist(), abs=1e-4)
