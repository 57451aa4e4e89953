"""Tests of the decoder as GPT-2 and Llama: logits of transformers, published sizes, weights, FLOPs."""

import math
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from pydantic import TypeAdapter
from torch.utils.flop_counter import FlopCounterMode

from train.config import schema
from train.errors import UserError
from train.models import build_backbone, padded_vocab
from train.models.initial_weights import init_weights
from train.objectives import build_objective

MODELS = sorted((Path(__file__).parents[3] / "conf/model").glob("*.yaml"))
PUBLISHED = {  # parameters, with the published vocabulary
    "gpt2_124m": (50257, 124439808),
    "gpt2_355m": (50257, 354823168),
    "gpt2_774m": (50257, 774030080),
    "gpt2_1558m": (50257, 1557611200),
    "llama_1b": (128256, 1235814400),
    "llama_7b": (32000, 6738415616),
}


def gpt2_names(model):
    """transformers' name of each of our parameters, and whether it is stored transposed."""
    names = {"embed.weight": ("wte.weight", False), "positions.weight": ("wpe.weight", False)}
    parts = {
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
    }
    parts |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for i in range(model.layers):
        for own_name, hf_name in parts.items():
            is_matrix = "norm" not in own_name
            names[f"blocks.{i}.{own_name}.weight"] = f"h.{i}.{hf_name}.weight", is_matrix
            names[f"blocks.{i}.{own_name}.bias"] = f"h.{i}.{hf_name}.bias", False
    return names | {f"norm.{leaf}": (f"ln_f.{leaf}", False) for leaf in ("weight", "bias")}


def llama_weights(state, model):
    """Our parameters, made from those of transformers' LlamaForCausalLM."""
    weights = {
        "backbone.embed.weight": state["model.embed_tokens.weight"],
        "backbone.norm.weight": state["model.norm.weight"],
    }
    weights["head.weight"] = state["lm_head.weight"]
    for i in range(model.layers):
        layer, block = f"model.layers.{i}.", f"backbone.blocks.{i}."
        qkv = [state[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
        weights[f"{block}attention.qkv.weight"] = torch.cat(qkv)
        weights[f"{block}attention.out.weight"] = state[f"{layer}self_attn.o_proj.weight"]
        gate_up = [state[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        weights[f"{block}mlp.gate_up.weight"] = torch.cat(gate_up)
        weights[f"{block}mlp.down.weight"] = state[f"{layer}mlp.down_proj.weight"]
        weights[f"{block}attention_norm.weight"] = state[f"{layer}input_layernorm.weight"]
        weights[f"{block}mlp_norm.weight"] = state[f"{layer}post_attention_layernorm.weight"]
    return weights


def rows(tokens):
    B, T = tokens.shape
    ones = torch.ones(B, T, dtype=torch.int32)
    return {"tokens": tokens, "targets": tokens, "positions": torch.arange(T).expand(B, T), "segments": ones}


def shaken(reference):
    """The reference with every parameter random, norms and biases too, and weights large enough to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            base = 1.0 if parameter.ndim == 1 and "bias" not in name else 0.0
            parameter.copy_(base + 0.1 * torch.randn(parameter.shape, generator=generator))
    return reference.eval()


@pytest.mark.parametrize("isolate", [True, False])
def test_gpt2_logits_equal_transformers(make_config, isolate):
    config = make_config("gpt_tiny", layers=3, width=96, heads=3, max_len=48, vocab_size=131, isolate=isolate)
    hf_config = transformers.GPT2Config(vocab_size=131, n_positions=48, n_embd=96, n_layer=3, n_head=3)
    reference = shaken(transformers.GPT2LMHeadModel(hf_config))
    objective = build_objective(config, 131).eval()
    weights = reference.transformer.state_dict()
    state = {}
    for own_name, (hf_name, transposed) in gpt2_names(config.model).items():
        state[f"backbone.{own_name}"] = weights[hf_name].T if transposed else weights[hf_name]
    objective.load_state_dict(state | {"head.weight": weights["wte.weight"]})
    tokens = torch.randint(0, 131, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = objective.logits(rows(tokens)) - reference(tokens).logits
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_logits_equal_transformers(make_config, kv_heads, isolate):
    config = make_config(
        "llama_tiny", layers=3, width=96, kv_heads=kv_heads, max_len=64, vocab_size=131, rope_theta=5e5, isolate=isolate
    )
    hf_config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=96,
        intermediate_size=config.model.mlp_width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=config.model.norm_eps,
        rope_theta=5e5,
    )
    reference = shaken(transformers.LlamaForCausalLM(hf_config))
    objective = build_objective(config, 131).eval()
    objective.load_state_dict(llama_weights(reference.state_dict(), config.model))
    tokens = torch.randint(0, 131, (3, 57), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = objective.logits(rows(tokens)) - reference(tokens).logits
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_shipped_models_on_meta_have_published_sizes(make_config, path):
    vocab, parameters = PUBLISHED.get(path.stem, (257, None))
    keys = yaml.safe_load(path.read_text()) | ({"vocab_size": vocab} if parameters else {})
    with torch.device("meta"):
        objective = build_objective(make_config(path.stem, **keys), vocab)
    assert all(p.is_meta for p in objective.parameters())
    if parameters:
        assert sum(p.numel() for p in objective.parameters()) == parameters


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_shipped_models_have_vocabularies_divisible_by_64(path):
    model = TypeAdapter(schema.Model).validate_python(yaml.safe_load(path.read_text()))
    assert padded_vocab(model, 257) % 64 == 0


def test_initial_weights_have_published_deviations(make_config):
    config = make_config("gpt_tiny", width=256, heads=4, layers=8, max_len=512)
    backbone = build_objective(config, 4000).backbone
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all()
        elif "norm" in name:
            assert parameter.eq(1).all()
        else:
            std = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.02)
            assert parameter.mean().item() == pytest.approx(0, abs=4 * std / parameter.numel() ** 0.5)


def test_initial_weights_depend_on_seed_and_name_alone(make_config):
    whole = build_objective(make_config("llama_tiny", seed=3), 257)
    torch.manual_seed(99)
    again = build_objective(make_config("llama_tiny", seed=3, layers=2), 257)
    other = build_objective(make_config("llama_tiny", seed=4), 257)
    for (name, a), b, c in zip(whole.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)
    flat = [p.detach().flatten()[:64] for name, p in whole.named_parameters() if "norm" not in name]
    assert len({tuple(x.tolist()) for x in flat}) == len(flat), "two parameters have the same values"


def test_deferred_build_has_the_weights_of_a_direct_one(make_config):
    config = make_config("llama_tiny")
    with torch.device("meta"):
        deferred = build_objective(config, 257)
    deferred.to_empty(device="cpu")
    init_weights(deferred, config.seed)
    direct = build_objective(config, 257)
    assert all(torch.equal(a, b) for a, b in zip(deferred.parameters(), direct.parameters(), strict=True))


def test_model_sizes_that_do_not_fit_are_all_named(make_config):
    model = make_config("llama_tiny", width=66, heads=4, kv_heads=3).model
    with pytest.raises(UserError, match=r"heads=4 .*width=66.*; .*kv_heads=3 .*heads=4"):
        build_backbone(model, 64)
    with pytest.raises(UserError, match="odd"):
        build_backbone(make_config("llama_tiny", width=36).model, 64)
    with pytest.raises(UserError, match=r"vocab_size=100 is less than the tokenizer's 101.*128"):
        build_backbone(make_config("gpt_tiny", vocab_size=100).model, 101)


@pytest.mark.parametrize("name", ["gpt_tiny", "llama_tiny"])
def test_activation_checkpointing_keeps_loss_and_gradients(make_config, pack, name):
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 257, (n,), generator=generator).tolist() for n in (9, 20, 9, 20, 9, 20)]
    batch = pack([documents[:2], documents[2:4], documents[4:]], 32)
    gradients = []
    ways = [{"checkpoint_activations": kind} for kind in (False, True, "attention", "mlp")]
    ways += [{"checkpoint_activations": True, "checkpoint_blocks": among} for among in (2, [1])]
    for way in ways:
        objective = build_objective(make_config(name, dropout=0.2, **way), 257)
        torch.manual_seed(5)
        objective(batch)["loss"][0].backward()
        gradients.append([p.grad for p in objective.parameters()])
    for found in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], found, strict=True))


def test_dropout_depends_on_the_seed_and_is_off_in_eval(make_config):
    objective = build_objective(make_config(dropout=0.3), 257)
    batch = rows(torch.arange(32)[None])

    def loss(seed):
        torch.manual_seed(seed)
        return objective(batch)["loss"][0].item()

    assert loss(1) == loss(1) != loss(2)
    objective.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize("name", ["gpt_tiny", "llama_tiny"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loss_is_float32_and_near_that_of_float32(make_config, name, dtype):
    objective = build_objective(make_config(name), 257)
    batch = rows(torch.arange(64).view(2, 32))
    right = objective(batch)["loss"][0]
    with torch.autocast("cpu", dtype):
        mixed = objective(batch)["loss"][0]
    low = objective.to(dtype)(batch)["loss"][0]
    for loss in (mixed, low):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(right.item(), rel=5e-3)
    low.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters())


HEAD = torch.ops.trireme.linear_cross_entropy_forward


def head_flops(hidden, weight, targets, ignore_index, label_smoothing, z_loss, for_hidden, for_weight, *, out_shape):
    """FLOPs of the head and its gradients, all computed in the forward pass; the counter cannot see into the op."""
    return 2 * math.prod((*hidden, weight[0])) * (1 + for_hidden + for_weight)


@pytest.mark.parametrize("name", ["gpt_tiny", "llama_tiny"])
def test_flops_per_token_equal_torch_flop_counter(make_config, name):
    objective = build_objective(make_config(name, isolate=False, layers=3, seq_len=64), 257)
    batch = rows(torch.randint(0, 257, (2, 64)))
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False, custom_mapping={HEAD: head_flops}) as counter:
        objective(batch)["loss"][0].backward()
    assert counter.get_total_flops() / 128 == objective.flops_per_token(64, causal=False)
    model = objective.backbone.model
    saved = 12 * 3 * model.width * (64 - 65 / 2)
    assert objective.flops_per_token(64) == objective.flops_per_token(64, causal=False) - saved
