"""Dry runs beside real steps of the same configurations, and what they are made of."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.data.examples import build_examples
from train.planning import dry_run
from train.planning.allocations import AllocationLog
from train.planning.batches import full_batch

FAMILIES = ["gpt_tiny", "llama_tiny", "bert_tiny", "t5_tiny", "lstm_tiny"]
CASES = ["precisions=bf16", "recompute=false", "batch.micro=3"]


def test_predicted_peak_is_the_measured_one(tmp_path: Path):
    """Five families, two micro-batches a step, in a process of its own; more: ``bench plan``."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench.plan", f"models={','.join(FAMILIES)}", *CASES, "stages=2", f"out={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=gloo_ranks.REPOSITORY, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(FAMILIES)
    for row in rows:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.01), row["configuration"]
        assert sum(row["parts"].values()) == row["predicted"]


def test_peak_counts_what_lived_together_by_part():
    log = AllocationLog()
    first = torch.zeros(100)
    log.see(first, "weights")
    begin = log.clock
    second = torch.zeros(50)
    log.see(second, "activations")
    log.see(second.view(5, 10), "activations")  # the same storage
    del second
    third = torch.zeros(10)
    log.see(third, "logits")
    log.pass_by(20, "logits")
    assert log.peak(begin).parts == {"weights": 400, "activations": 200}
    assert log.peak(begin).nbytes == 600
    assert log.peak(log.clock).nbytes == 440
    log.name(third, "gradients", only="logits")
    assert log.peak(log.clock).parts == {"weights": 400, "gradients": 40}


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_hold_each_element_of_a_matrix_once(stage: int):
    shapes = [torch.Size((4, 5)), torch.Size((3, 3)), torch.Size((1, 2))]
    ranges = dry_run._ranges_of_ranks(shapes, own=8, stage=stage, world_size=4)
    for number, shape in enumerate(shapes):
        elements = [n for of_rank in ranges for n in range(of_rank[number][0], sum(of_rank[number]))]
        assert elements == list(range(shape.numel()))


@pytest.mark.parametrize("words", [[], ["experiment=t5_tiny"], ["experiment=bert_tiny"], ["experiment=lstm_tiny"]])
def test_planned_batch_has_the_columns_of_the_data(words: list[str]):
    class Tokenizer:
        eot, vocab_size, special = 0, 4, ()

        def id_of(self, name: str) -> int:
            return 1

        def decode(self, ids: list[int]) -> str:
            return "a"

        def name_of(self, number: int) -> str:
            return "a"

    config = gloo_ranks.configuration.load([*words, "cluster.workers=1", "tracking=off"])
    columns = build_examples(config, Tokenizer()).columns  # type: ignore[arg-type]
    batch = full_batch(config, 3)
    expected = {name: ((3, *shape), dtype) for name, (shape, dtype) in columns.items()}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == expected
    if config.objective.name == "masked":
        share = (batch["targets"] >= 0).float().mean().item()
        assert share == pytest.approx(config.objective.rate, abs=0.02)


STAGE_3 = ["zero.stage=3", "precision=bf16", "tracking=off", "batch.micro=1"]


@pytest.mark.parametrize("words", [["experiment=llama_tiny"], ["experiment=gpt_tiny", "zero.hpz=2"]])
def test_short_collectives_hold_what_deepspeeds_own_do(words: list[str], monkeypatch):
    config = gloo_ranks.configuration.load([*words, *STAGE_3, "cluster.workers=6", "batch.global=6"])
    short = dry_run.dry_run(config, 6, "cuda")
    monkeypatch.setattr(dry_run.short_collectives, "in_place_of_deepspeeds", contextlib.nullcontext)
    own = dry_run.dry_run(config, 6, "cuda")
    assert (short.step.nbytes, short.start.nbytes, short.resting) == (own.step.nbytes, own.start.nbytes, own.resting)
    assert short.collectives == own.collectives
    assert moved(short) == moved(own)


def moved(run: dry_run.DryRun) -> int:
    """Bytes that the operators of a step read and write."""
    return sum(work.nbytes * calls for work, calls in run.work.items())


def test_operators_of_a_dry_run_do_not_grow_with_the_world():
    calls = []
    for size in (4, 1024):
        words = ["experiment=gpt_tiny", *STAGE_3, f"cluster.workers={size}", f"batch.global={size}"]
        run = dry_run.dry_run(gloo_ranks.configuration.load(words), size, "cuda")
        calls.append(sum(run.work.values()))
    assert calls[1] < 1.2 * calls[0]
