"""Tests of the driver's check of init.from, which reads no weights and starts nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import gloo_ranks
from helpers.run_dirs import write_manifest
from safetensors.numpy import save_file

from train.config import load as configuration
from train.errors import UserError
from train.pretrained.inspect_source import check_source, describe_source

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA |= {
    "intermediate_size": 176,
    "max_position_embeddings": 32,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
OVERRIDES = [
    "model=llama_tiny",
    "model.layers=2",
    "model.width=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.mlp_width=176",
]
OVERRIDES += ["model.max_len=32", "batch.seq_len=16"]


HEAD = np.arange(320 * 32, dtype=np.float32).reshape(320, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the config.json of a small Llama and a file with one of its weights."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.json").write_text(json.dumps(LLAMA))
    save_file({"lm_head.weight": HEAD}, tmp_path / "there/model.safetensors")
    return tmp_path / "there"


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        check_source(config)
    return str(caught.value)


def test_source_that_fits_passes_the_drivers_check(make, folder: Path):
    check_source(make(*OVERRIDES, f"init.from={folder}"))
    check_source(
        make(*OVERRIDES, f"init.from={folder}", "model.max_len=64")
    )  # only the ranks know whether positions have weights


def test_missing_folder_or_folder_without_a_model_is_refused(make, folder: Path):
    nowhere = refusal(make(*OVERRIDES, "init.from=nowhere"))
    assert all(words in nowhere for words in ("nowhere does not exist", "name the folder of a run"))
    assert "is a file: name the folder" in refusal(make(*OVERRIDES, f"init.from={folder / 'config.json'}"))
    (folder / "config.json").unlink()
    assert "is not the folder of a run (which has a config.yaml) or of a Hugging Face model" in refusal(
        make(*OVERRIDES, f"init.from={folder}")
    )


def test_pickled_or_missing_weights_are_refused(make, folder: Path):
    config = make(*OVERRIDES, f"init.from={folder}")
    (folder / "model.safetensors").unlink()
    assert "has a config.json and no weights" in refusal(config)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "pytorch_model.bin, which is pickled" in refusal(config)
    messages = {
        "/etc/passwd": "not in its folder",
        "../model.safetensors": "not in its folder",
        "other.safetensors": "is missing",
    }
    for name, message in messages.items():
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert message in refusal(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba', which is not read; those that are: gpt2, llama, bert, t5"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu, which must be silu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_type=llama3"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"attention_bias": True}, "attention_bias=true, mlp_bias=false, which must be equal"),
        ({"hidden_size": None}, "hidden_size, which is missing"),
        ({"num_hidden_layers": 3}, "to have what is there: model.layers=3"),
    ],
)
def test_source_with_unsupported_config_is_refused_naming_its_key(make, folder: Path, change: dict, message: str):
    (folder / "config.json").write_text(json.dumps({"mlp_bias": False} | LLAMA | change))
    assert message in refusal(make(*OVERRIDES, f"init.from={folder}"))


def test_source_of_another_family_or_without_checkpoint_is_refused(make, folder: Path):
    other = make("model=bert_tiny", "objective=masked", f"init.from={folder}")
    assert "(Hugging Face, Llama) does not fit" in refusal(other)
    assert "model.family is encoder here, decoder there" in refusal(other)
    run = folder.parent / "first"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(configuration.to_dict(make(*OVERRIDES))))
    assert "has no complete checkpoint yet" in refusal(make(*OVERRIDES, f"init.from={run}"))
    write_manifest(run / "checkpoints" / "step_4", shapes={"backbone.embed.weight": [320, 32]})
    check_source(make(*OVERRIDES, f"init.from={run}"))
    assert "It has the steps 4" in refusal(make(*OVERRIDES, f"init.from={run}", "init.checkpoint=5"))


def test_run_with_checkpoints_is_not_checked(make):
    config = make(*OVERRIDES, "init.from=nowhere")
    (Path(config.run.dir) / "checkpoints/step_2").mkdir(parents=True)
    check_source(config)


def test_missing_init_from_ends_the_command_before_any_start(as_typed, tmp_path: Path):
    command = [sys.executable, "-m", "cluster", "train", *as_typed("init.from=nowhere")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ, cwd=gloo_ranks.REPOSITORY, check=False
    )
    assert done.returncode == 2
    assert "init.from=nowhere does not exist" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def rewritten(folder: Path, **values) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | values))


def test_weights_are_believed_before_the_flag_that_ties_them(make, folder: Path):
    """As transformers does: a head that differs from the embedding is one of its own."""
    file, untied, tied = folder / "model.safetensors", *((*OVERRIDES, f"model.tied={t}") for t in ("false", "true"))
    rewritten(folder, tie_word_embeddings=True)
    for embedding, fits, differs in ((HEAD + 1, untied, tied), (HEAD, tied, untied)):
        save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": HEAD}, file)
        check_source(make(*fits, f"init.from={folder}"))
        assert "model.tied is" in refusal(make(*differs, f"init.from={folder}"))
    rewritten(folder, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    save_file({"model.embed_tokens.weight": HEAD}, file)
    check_source(make(*tied, f"init.from={folder}"))
    rewritten(folder, tie_word_embeddings=False, architectures=[["LlamaForCausalLM"], 3])  # no names of classes
    check_source(make(*untied, f"init.from={folder}"))
    (folder / "config.json").write_text(json.dumps(T5))
    save_file({"shared.weight": HEAD, "lm_head.weight": HEAD + 1}, file)
    assert "it also says whether the output is scaled" in refusal(make("init.from=" + str(folder)))


T5 = {"model_type": "t5", "num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 176, "vocab_size": 320}
INDEX = "model.safetensors.index.json"


def test_folder_that_is_at_odds_with_itself_is_refused_with_both_names(make, folder: Path):
    config = make(*OVERRIDES, f"init.from={folder}")
    save_file({"model.embed_tokens.weight": HEAD}, folder / "a.safetensors")
    save_file({"model.embed_tokens.weight": HEAD}, folder / "b.safetensors")
    index = {"model.embed_tokens.weight": "a.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    assert f"two sets of weights, model.safetensors and the files of {INDEX}" in refusal(config)
    (folder / "model.safetensors").unlink()
    check_source(config)
    (folder / INDEX).write_text(json.dumps({"weight_map": index | {"lm_head.weight": "b.safetensors"}}))
    assert "embed_tokens.weight is in a.safetensors and in b.safetensors" in refusal(config)
    (folder / INDEX).write_text(json.dumps({"weight_map": index | {"lm_head.weight": "a.safetensors"}}))
    assert "lm_head.weight is in a.safetensors, and it is not" in refusal(config)
    (folder / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(config)
    (folder / "adapter_config.json").write_text("{}")
    assert "Merge them first" in refusal(config)


def test_pickled_copy_beside_safetensors_is_said_to_be_left(make, folder: Path):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    kind = describe_source(folder, "latest").kind
    assert kind == "Hugging Face, Llama; pytorch_model.bin not read, only safetensors are"
