"""The verbs of ``python -m train``, as a person gives them, on a small trained run."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import worlds

from train.__main__ import main
from train.data.loader import held_out_text
from train.data.shards import Corpus
from train.schema import Config


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("trained")
    config = worlds.on_corpus(corpus, folder / "run", "steps=6", "save_every=2", "zero=3", "cluster.workers=2")
    worlds.train_world(config, corpus)
    return config


def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(worlds.REPOSITORY), "COLUMNS": "150"}
    command = [sys.executable, "-m", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_evaluate_prints_the_run_s_own_loss_and_gzip_on_the_same_bytes(trained: Config, corpus: Path):
    done = verb("evaluate", f"run.dir={trained.run.dir}")
    assert done.returncode == 0, done.stderr
    loss = worlds.metrics(trained)[-1]["val_loss"]
    assert f"{loss:.4f}" in done.stdout
    text = b"".join(held_out_text(Corpus(corpus)))
    assert f"{8 * len(gzip.compress(text, 9)) / len(text):.4f}" in done.stdout
    assert re.search(r"bits_per_byte .* \d\.\d{4}", done.stdout)


def test_generate_writes_on_from_the_prompt_the_same_for_a_seed(trained: Config):
    texts = [verb("generate", f"run.dir={trained.run.dir}", "prompt=ab =", "max_tokens=12", "seed=3") for _ in range(2)]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith("ab =")
    assert texts[0].stdout == texts[1].stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate"], "run.dir=... is needed"),
        (["evaluate", "run.dir=/nowhere"], "holds no run"),
        (["generate", "run.dir=RUN", "checkpoint=3"], "It has the steps 2, 4, 6"),
        (["generate", "run.dir=RUN", "temperature=hot"], "temperature"),
        (["generate", "run.dir=RUN", "promt=x"], "prompt"),
        (["sing"], "usage"),
    ],
)
def test_a_mistake_is_answered_with_code_2(trained: Config, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main([a.replace("RUN", str(trained.run.dir)) for a in arguments]) == 2
    assert said in capsys.readouterr().err
