"""Tests of the encoder-decoder as T5 1.0 and 1.1 and as the original Transformer."""

import itertools

import pytest
import torch
import transformers

from train.config import schema
from train.generation.beam_search import beam_search
from train.generation.sample_loop import generate
from train.models.encdec import sinusoidal_positions
from train.objectives import build_objective

SIZES = {"layers": 3, "width": 96, "heads": 3, "mlp_width": 160, "head_dim": 20, "vocab_size": 131}


def our_weights(state, layers, gated):
    """Our parameters, made from those of transformers' T5ForConditionalGeneration."""
    weights = {"backbone.embed.weight": state["shared.weight"], "head.weight": state["lm_head.weight"]}
    for side, middle in (("encoder", 1), ("decoder", 2)):
        weights[f"backbone.{side}.norm.weight"] = state[f"{side}.final_layer_norm.weight"]
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[f"backbone.{side}.relative.weight"] = state[bias]
        for i in range(layers):
            own_block, layers_of_block = f"backbone.{side}.blocks.{i}.", f"{side}.block.{i}.layer."
            own = layers_of_block + "0.SelfAttention."
            weights[own_block + "attention.layer.qkv.weight"] = torch.cat([state[f"{own}{x}.weight"] for x in "qkv"])
            weights[own_block + "attention.layer.out.weight"] = state[f"{own}o.weight"]
            weights[own_block + "attention.norm.weight"] = state[layers_of_block + "0.layer_norm.weight"]
            if side == "decoder":
                across = layers_of_block + "1.EncDecAttention."
                weights[own_block + "cross.layer.q.weight"] = state[across + "q.weight"]
                weights[own_block + "cross.layer.kv.weight"] = torch.cat([state[f"{across}{x}.weight"] for x in "kv"])
                weights[own_block + "cross.layer.out.weight"] = state[across + "o.weight"]
                weights[own_block + "cross.norm.weight"] = state[layers_of_block + "1.layer_norm.weight"]
            dense = f"{layers_of_block}{middle}.DenseReluDense."
            if gated:
                weights[own_block + "mlp.layer.gate_up.weight"] = torch.cat(
                    [state[f"{dense}wi_{n}.weight"] for n in (0, 1)]
                )
            else:
                weights[own_block + "mlp.layer.up.weight"] = state[dense + "wi.weight"]
            weights[own_block + "mlp.layer.down.weight"] = state[dense + "wo.weight"]
            weights[own_block + "mlp.norm.weight"] = state[f"{layers_of_block}{middle}.layer_norm.weight"]
    return weights


def shaken(reference):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            base = 1.0 if "layer_norm" in name else 0.0
            parameter.copy_(base + 0.1 * torch.randn(parameter.shape, generator=generator))
    return reference.eval()


def translations(rows=3, source=150, target=20):
    """A batch whose sources are longer than the furthest distance; later rows end in padding."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(source).expand(rows, source)
    return {
        "tokens": torch.randint(0, 131, (rows, source), generator=generator),
        "positions": positions,
        "segments": (positions < source - 7 * torch.arange(rows)[:, None]).int(),
        "target_tokens": torch.randint(0, 131, (rows, target), generator=generator),
        "target_segments": torch.ones(rows, target, dtype=torch.int32),
        "targets": torch.randint(0, 131, (rows, target), generator=generator),
    }


@pytest.mark.parametrize(("activation", "hf_activation"), [("relu", "relu"), ("geglu", "gated-gelu")])
def test_initial_weights_have_deviations_of_t5(make_config, activation, hf_activation):
    config = make_config("t5_tiny", **SIZES, activation=activation, tied=False)
    sizes = {"vocab_size": 131, "d_model": 96, "d_kv": 20, "d_ff": 160, "num_layers": 3, "num_heads": 3}
    torch.manual_seed(0)
    reference = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, feed_forward_proj=hf_activation))
    expected = our_weights(reference.state_dict(), 3, hf_activation != "relu")
    weights = build_objective(config, 131).state_dict()
    assert weights.keys() == expected.keys()
    expected["head.weight"] = expected["head.weight"] * 96**-0.5  # as t5x; transformers' logits deviate by sqrt(96)
    for name, weight in expected.items():
        parts = 3 if "qkv" in name else 1  # queries, keys and values differ in deviation
        for part, own in zip(weight.chunk(parts), weights[name].chunk(parts), strict=True):
            torch.testing.assert_close(
                own.square().mean().sqrt(), part.square().mean().sqrt(), rtol=0.2, atol=0, msg=name
            )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("activation", "hf_activation"), [("relu", "relu"), ("geglu", "gated-gelu")])
def test_t5_logits_equal_transformers(make_config, tied, activation, hf_activation):
    config = make_config("t5_tiny", **SIZES, activation=activation, tied=tied)
    sizes = {"vocab_size": 131, "d_model": 96, "d_kv": 20, "d_ff": 160, "num_layers": 3, "num_heads": 3}
    settings = transformers.T5Config(
        **sizes, feed_forward_proj=hf_activation, tie_word_embeddings=tied, decoder_start_token_id=0
    )
    reference = shaken(transformers.T5ForConditionalGeneration(settings))
    objective = build_objective(config, 131).eval()
    assert objective.load_state_dict(our_weights(reference.state_dict(), 3, hf_activation != "relu"))
    batch = translations()
    with torch.no_grad():
        right = reference(
            batch["tokens"], attention_mask=batch["segments"], decoder_input_ids=batch["target_tokens"]
        ).logits
        assert (objective.logits(batch) - right).abs().max() < 1e-5 * right.abs().max()


@pytest.mark.parametrize("beams", [1, 3])
def test_t5_greedy_and_beam_texts_equal_transformers(make_config, beams):
    """Greedy search and beam search after sources of unequal length."""
    sizes = {"vocab_size": 131, "d_model": 96, "d_kv": 20, "d_ff": 160, "num_layers": 3, "num_heads": 3}
    reference = shaken(
        transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    ).double()
    objective = build_objective(make_config("t5_tiny", **SIZES), 131).double().eval()
    objective.load_state_dict(our_weights(reference.state_dict(), 3, False))
    batch, end = translations(), 1
    sources = [row[: int(n)].tolist() for row, n in zip(batch["tokens"], batch["segments"].sum(1), strict=True)]
    options = {"prompts": [], "temperature": 0.0, "max_tokens": 10, "beams": beams, "n": beams}
    find = beam_search if beams > 1 else generate
    texts = find(objective, [[*source, 0] for source in sources], schema.GenerationConfig.model_validate(options), end)
    options = {
        "num_beams": beams,
        "num_return_sequences": beams,
        "max_new_tokens": 10,
        "eos_token_id": end,
        "pad_token_id": 0,
    }
    options |= {"early_stopping": "never"} if beams > 1 else {}
    right = reference.generate(batch["tokens"], attention_mask=batch["segments"], do_sample=False, **options)
    own_texts = [text.tokens + ([end] if text.reason == "eot" else []) for text in itertools.chain(*texts)]
    assert own_texts == [row[1 : 1 + len(text)] for row, text in zip(right.tolist(), own_texts, strict=True)]
    assert len({tuple(text) for text in own_texts}) > 1


def test_original_transformer_equals_torch(make_config):
    sizes = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "vocab_size": 131, "norm_eps": 1e-5}
    objective = build_objective(make_config("transformer_tiny", **sizes), 131).eval()
    reference = shaken(torch.nn.Transformer(32, 2, 2, 2, 48, 0.0, batch_first=True))
    reference.encoder.norm = reference.decoder.norm = None  # Vaswani et al. have no norm after the last block
    state, weights = reference.state_dict(), {}
    attention = {"self_attn": "attention", "multihead_attn": "cross"}
    for side in ("encoder", "decoder"):
        for i in range(2):
            layer, block = f"{side}.layers.{i}.", f"backbone.{side}.blocks.{i}."
            for leaf in ("weight", "bias"):
                for n, (name, own_name) in enumerate(list(attention.items())[: 1 + (side == "decoder")]):
                    inner = state[f"{layer}{name}.in_proj_{leaf}"]
                    if own_name == "attention":
                        weights[f"{block}attention.layer.qkv.{leaf}"] = inner
                    else:
                        weights[f"{block}cross.layer.q.{leaf}"] = inner[:32]
                        weights[f"{block}cross.layer.kv.{leaf}"] = inner[32:]
                    weights[f"{block}{own_name}.layer.out.{leaf}"] = state[f"{layer}{name}.out_proj.{leaf}"]
                    weights[f"{block}{own_name}.norm.{leaf}"] = state[f"{layer}norm{n + 1}.{leaf}"]
                for own_name, name in (("up", "linear1"), ("down", "linear2")):
                    weights[f"{block}mlp.layer.{own_name}.{leaf}"] = state[f"{layer}{name}.{leaf}"]
                weights[f"{block}mlp.norm.{leaf}"] = state[f"{layer}norm{3 if side == 'decoder' else 2}.{leaf}"]
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert (set(missing), unexpected) == ({"backbone.embed.weight", "head.weight"}, [])
    batch = translations(source=30)
    embed = objective.backbone.embed
    with torch.no_grad():
        source, target = (
            embed(batch[k]) * 32**0.5 + sinusoidal_positions(torch.arange(n)[None], 32)
            for k, n in (("tokens", 30), ("target_tokens", 20))
        )
        padding = batch["segments"] == 0
        ahead = torch.nn.Transformer.generate_square_subsequent_mask(20)
        options = {"tgt_mask": ahead, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        hidden = reference(source, target, **options)
        assert (objective.backbone(batch) - hidden).abs().max() < 1e-5
        assert torch.equal(sinusoidal_positions(torch.tensor([[0]]), 4), torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]))


@pytest.mark.parametrize("name", ["t5_tiny", "transformer_tiny"])
def test_target_token_sees_earlier_targets_and_own_source_only(make_config, name):
    objective = build_objective(make_config(name, vocab_size=131), 131).eval()
    batch = translations(source=30)
    batch["segments"][:, 15:] = 2
    batch["target_segments"][:, 10:] = 2
    changed = {**batch, "tokens": batch["tokens"].clone(), "target_tokens": batch["target_tokens"].clone()}
    changed["tokens"][:, 15:] = 5
    changed["target_tokens"][:, 7] = 5
    with torch.no_grad():
        before, after = objective.logits(batch), objective.logits(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:10], after[:, 7:10])
    assert not torch.equal(before[:, 10:], after[:, 10:])
