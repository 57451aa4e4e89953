"""Which kernels a run uses, and that tiles are measured before the first step, once a machine, and kept."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import gloo_ranks

import kernels
from kernels import tuning
from train import kernel_setup
from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.sampling.batch_plan import Cursor


@pytest.fixture(autouse=True)
def as_before(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.clear_cache()
    yield
    tuning.clear_cache()
    kernels.use("auto", torch.device("cpu"))


def test_choose_kernels_returns_its_choice_with_the_reason():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernels.use("auto", cpu) == "torch's own: no CUDA device"
    assert kernels.use("auto", cuda) == "Triton's, on CUDA"
    assert kernels.use("torch", cuda) == "torch's own, as kernels=torch asks"
    assert kernels.use("triton", cpu) == "Triton's, as kernels=triton asks, interpreted on the CPU: slow"


def test_triton_on_a_cpu_without_interpreter_is_refused_with_the_cure():
    code = "import torch, kernels; kernels.use('triton', torch.device('cpu'))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1 in the environment" in done.stderr.splitlines()[-1]


def test_tiles_are_measured_on_request_only_and_stored(tmp_path):
    slow, fast = {"BLOCK": 1}, {"BLOCK": 2}
    ran = []

    def run(choice):
        ran.append(choice)
        sum(range(20_000 if choice == slow else 10))

    assert tuning.best_tiles("op", (64,), [slow, fast], run) == slow
    assert not ran
    with tuning.measuring_tiles():
        assert tuning.best_tiles("op", (64,), [slow, fast], run) == fast
    measured = len(ran)
    [file] = tmp_path.rglob("*.json")
    assert json.loads(file.read_text()) == {"op 64": fast}
    tuning.clear_cache()
    assert tuning.best_tiles("op", (64,), [slow, fast], run) == fast
    assert tuning.best_tiles("op", (128,), [slow, fast], run) == slow
    assert len(ran) == measured


def test_damaged_tile_table_is_measured_anew(tmp_path):
    with tuning.measuring_tiles():
        tuning.best_tiles("op", (64,), [{"BLOCK": 1}, {"BLOCK": 2}], lambda choice: None)
    [file] = tmp_path.rglob("*.json")
    file.write_text("{")
    tuning.clear_cache()
    assert tuning.best_tiles("op", (64,), [{"BLOCK": 1}, {"BLOCK": 2}], lambda choice: None) == {"BLOCK": 1}


@pytest.mark.parametrize("model", ["gpt_tiny", "t5_tiny", "bert_tiny", "lstm_tiny"])
def test_tiles_are_measured_on_a_micro_batch_of_the_run(corpus, model):
    objective = {"t5_tiny": "seq2seq", "bert_tiny": "masked"}.get(model, "causal")
    data = [*gloo_ranks.TEXT, "data.paths=[x]", f"data.dir={corpus}", "batch.seq_len=16"]
    config = configuration.load([f"model={model}", f"objective={objective}", "precision=fp32", *data])
    opened = Corpus(corpus, config.model.special)
    batch = training_loader(opened, config, RankShare(0, 1, 2)).peek(Cursor())[0]
    assert batch["tokens"].shape == (2, 16)
    kernel_setup.measure_tiles(config, opened.tokenizer.vocab_size, batch)
