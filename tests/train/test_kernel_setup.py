"""Which kernels a run uses, and that tiles are measured before the first step, once a machine, and kept."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from helpers import gloo_ranks

import kernels
from kernels import requirements, tuning
from train import kernel_setup
from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.sampling.batch_plan import Cursor


@pytest.fixture(autouse=True)
def as_before(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.clear_cache()
    yield
    tuning.clear_cache()
    kernels.use("auto", torch.device("cpu"))


def test_choose_kernels_returns_its_choice_with_the_reason():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernels.use("auto", cpu) == "torch's own: no CUDA device"
    with requirements.assuming_limits(requirements.DeviceLimits((8, 0), 163 << 10)):
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


SLOW, FAST = {"BLOCK": 1}, {"BLOCK": 2}


def test_tiles_are_kept_beside_compiled_kernels_where_those_have_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "job"))
    measure_once(FAST)
    assert len(list((tmp_path / "job" / "trireme-tiles").glob("*.json"))) == 1


def measure_once(faster):
    """Measures a class of shapes, on a host where the tiles ``faster`` are."""

    def run(tiles):
        sum(range(10 if tiles == faster else 20_000))

    with tuning.measuring_tiles():
        tuning.best_tiles("op", (64,), [SLOW, FAST], run)


def test_fixed_choices_hold_against_those_of_this_machine():
    measure_once(FAST)
    tuning.fix_choices({"op 64": SLOW})
    assert tuning.best_tiles("op", (64,), [SLOW, FAST], lambda tiles: None) == SLOW
    measure_once(FAST)
    assert tuning.used_choices() == {"op 64": SLOW}
    tuning.fix_choices({})  # of a run that has not met this class: what other runs have measured is not taken
    assert tuning.best_tiles("op", (64,), [SLOW, FAST], lambda tiles: None) == SLOW


def choose_on_hosts(world, emit, file, hosts, cache):
    """A start on ranks that each have a host: (the file's GPU, the faster tiles there); its choices and its notes."""
    os.environ["XDG_CACHE_HOME"] = f"{cache}/{world.rank}"
    gpu, faster = hosts[world.rank]
    world = dataclasses.replace(world, local_rank=0)
    notes = []
    made_on = {"device": gpu, "sources": "123"}
    chosen = kernel_setup.share_choices(file, made_on, world, lambda: measure_once(faster), notes.append)
    return chosen, tuning.used_choices(), notes


def start_on(tmp_path, *hosts):
    """Starts on new machines, which have measured nothing, with the run's own folder: (choices, notes) by rank."""
    cache = tempfile.mkdtemp(dir=tmp_path)
    ranks = gloo_ranks.run(len(hosts), choose_on_hosts, tmp_path / "kernels.json", hosts, cache)
    saved = json.loads((tmp_path / "kernels.json").read_text())
    assert all(chosen == saved["choices"] for chosen, *_ in ranks)
    choices = [used["op 64"] for _, used, _ in ranks]
    return choices, [notes for *_, notes in ranks]


def test_choices_of_rank_0_hold_on_all_ranks_and_on_resume(tmp_path):
    slow_here, fast_here = ("H100", SLOW), ("H100", FAST)
    assert start_on(tmp_path, fast_here, slow_here) == ([FAST, FAST], [[], []])
    assert start_on(tmp_path, slow_here, slow_here) == ([FAST, FAST], [[], []])


def test_choices_are_made_anew_on_another_gpu_and_it_is_said(tmp_path):
    start_on(tmp_path, ("H100", FAST))
    choices, [[note]] = start_on(tmp_path, ("A100", SLOW))
    assert choices == [SLOW]
    assert "device H100 -> A100" in note
    assert "not bit for bit" in note
    (tmp_path / "kernels.json").write_text("{")
    _, [[note]] = start_on(tmp_path, ("A100", SLOW))
    assert "device unknown -> A100" in note


def test_a_rank_with_another_gpu_chooses_for_itself_and_it_is_said(tmp_path):
    choices, notes = start_on(tmp_path, ("H100", FAST), ("A100", SLOW))
    assert choices == [FAST, SLOW]
    assert "rank 1 chooses its kernels for itself, device H100 -> A100" in notes[0][0]


def test_the_attention_that_was_chosen_is_said():
    tiles = {"attention_forward bfloat16 64": FAST}
    assert kernel_setup.describe_attention(tiles) == ""
    both = tiles | {"attention_backend a": "flash", "attention_backend b": "triton", "attention_backend c": "flash"}
    assert kernel_setup.describe_attention(both) == (
        "; attention by torch's flash kernels and Triton's kernels, measured as the fastest here"
    )
