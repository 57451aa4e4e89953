"""Learning a tokenizer: from about so much text whatever the size of its documents, in bounded memory and time."""

import argparse
import inspect
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.config.keys.data import TokenizerConfig
from train.data.corpus.shards import Corpus
from train.data.prepare import build
from train.data.prepare.prepare import prepare
from train.data.tokenizer import Tokenizer, build_tokenizer

TEXT = "".join(inspect.getsource(module) for module in (argparse, inspect))
BPE = TokenizerConfig(kind="bpe", vocab_size=600)


def quiet(_event):
    pass


def write(path: Path, rows: int) -> Path:
    """TEXT in one plain file, or in rows of a .jsonl file."""
    if rows == 1:
        path.write_text(TEXT)
        return path
    step = -(-len(TEXT) // rows)
    path = path.with_suffix(".jsonl")
    path.write_text(
        "".join(json.dumps({"text": TEXT[begin : begin + step]}) + "\n" for begin in range(0, len(TEXT), step))
    )
    return path


@pytest.mark.parametrize("rows", [1, 6, 600])
def test_about_so_much_is_learned_from_whatever_the_documents(tmp_path, text_data, monkeypatch, rows):
    monkeypatch.setattr(build, "_LEARN_FROM", 100_000)
    monkeypatch.setattr(build, "_LEARN_PART", 2000)
    data, events = text_data(write(tmp_path / "a.txt", rows), kind="bpe", vocab_size=600, val_fraction=0.0), []
    corpus = Corpus(prepare(data, events.append))
    (learned,) = [event["total"] for event in events if event["phase"] == "merges"]
    assert 60_000 < learned < 140_000
    assert corpus.tokenizer.vocab_size == 600
    again = Corpus(prepare(data.model_copy(update={"dir": "again"}), quiet))
    assert again.tokenizer.fingerprint == corpus.tokenizer.fingerprint


def test_text_below_the_limit_is_learned_from_whole(tmp_path, text_data, monkeypatch):
    monkeypatch.setattr(build, "_LEARN_PART", 2000)
    corpus = Corpus(
        prepare(text_data(write(tmp_path / "a.txt", 1), kind="bpe", vocab_size=600, val_fraction=0.0), quiet)
    )
    text = corpus.tokenizer.decode(corpus.split("train").document(0).tolist())
    assert corpus.tokenizer.content == build_tokenizer(BPE, [text], "")


def test_fewer_tokens_than_asked_for_are_said_with_the_cure(tmp_path, text_data):
    (tmp_path / "a.txt").write_text("one two one two")
    events = []
    corpus = Corpus(prepare(text_data("a.txt", kind="bpe", vocab_size=4096, val_fraction=0.0), events.append))
    _, note = [event["text"] for event in events if event["phase"] == "note"]  # the first: how files are read
    size = corpus.tokenizer.vocab_size
    assert f"the tokenizer has {size} tokens, not the 4,096 of data.tokenizer.vocab_size" in note
    assert f"data.tokenizer.vocab_size={size}" in note


@pytest.mark.parametrize("signs", ["abcdefghijklmnopqrstuvwxyz", "ACGT", "-", " ", "的一是不了人我在有他"])
def test_time_of_learning_is_in_proportion_to_a_text_of_one_word(signs):
    text = "".join(random.Random(0).choices(signs, k=300_000)) + "x"
    begin = time.process_time()
    made = Tokenizer(build_tokenizer(BPE, [TEXT, text], ""))
    assert time.process_time() - begin < 10  # without a bound on words: minutes
    assert made.decode(made.encode(text)) == text


def test_few_long_words_are_learned_from():
    dna, prose = "ACGT" * 2_000_000, ["the quick brown fox " * 20, "静夜思床前明月光 " * 20]
    few = build_tokenizer(BPE, [*prose, dna[: 4 << 20]], "")
    assert build_tokenizer(BPE, [*prose, dna[: 4 << 20], dna[: 1 << 20]], "") == few


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_memory_does_not_grow_with_the_document(tmp_path, kind):
    (tmp_path / "a.txt").write_text((TEXT * 40)[:4_000_000])
    code = f"""
import resource
from train.config import schema
from train.config.keys.data import TokenizerConfig
from train.data.prepare.prepare import prepare
import webdataset, train.data.prepare.workers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
tokenizer = TokenizerConfig(kind={kind!r}, vocab_size={600 if kind == "bpe" else None})
data = schema.DataConfig(source="text", paths=["a.txt"], tokenizer=tokenizer, workers=1)
prepare(data, lambda event: None)
print(peak() - before)
"""
    root = str(Path(__file__).parents[4])
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 80_000, "kB; at a hundred bytes a character it would be 400,000"
