"""Corpora on disk: plain WebDataset, deterministic bytes, damage refused with the cure."""

import json
import os
import shutil
from itertools import chain

import numpy as np
import pytest
import webdataset

from train.data.corpus import shards
from train.data.corpus.shards import Corpus
from train.data.sampling.epoch_order import DocSpans
from train.errors import UserError
from train.util import io

UNEVEN = [[3, 5, 2, 9, 4, 6, 8], [11], [1 + i % 13 for i in range(100)]]


def test_webdataset_reads_the_same_samples(build_corpus):
    corpus = build_corpus(UNEVEN)
    split = corpus.split("train")
    url = str(corpus.folder / "train-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert [int(sample["__key__"]) for sample in samples] == list(range(108))
    for number, sample in enumerate(samples):
        assert sample["tokens.npy"].tolist() == [256, *split.document(number).tolist(), 256]
        assert sample["meta.json"]["bytes"] == split.text_bytes[number] == len(split.document(number))


def test_shard_bytes_depend_on_its_documents_alone(tmp_path, monkeypatch):
    ids = np.array([9, 70000, 9])
    documents = [("a", 3, [ids]), ("中文" * 300, 5, [ids])]
    parted = [("a", 3, [ids[:1], ids[1:]]), ("中文" * 300, 5, [ids[:2], ids[2:]])]
    (tmp_path / "other").mkdir()
    first = shards.write_shard(tmp_path / "a.tar", 5, np.dtype("uint32"), documents)
    monkeypatch.setattr(shards, "_SPOOL", 1)
    second = shards.write_shard(tmp_path / "other" / "a.tar", 5, np.dtype("uint32"), parted)
    assert first[0] == second[0]
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "other" / "a.tar").read_bytes()
    assert first[0].size == (tmp_path / "a.tar").stat().st_size


def test_table_offsets_are_right_behind_long_names(tmp_path):
    ids = np.arange(50, dtype=np.uint32)
    documents = [("中" * 900, 7, [ids]), ("b", 8, [ids + 1])]
    _, table = shards.write_shard(tmp_path / "a.tar", 0, ids.dtype, documents)
    content = np.frombuffer((tmp_path / "a.tar").read_bytes(), np.uint32)
    for number in range(2):
        begin = table[0, number] // 4
        assert content[begin : begin + 50].tolist() == (ids + number).tolist()
    assert table[1:].tolist() == [[49, 49], [7, 8]]


def test_split_counts_samples_tokens_and_bytes(build_corpus):
    split = build_corpus(UNEVEN).split("train")
    lengths = list(chain.from_iterable(UNEVEN))
    assert (split.samples, split.bytes, split.tokens) == (108, sum(lengths), sum(lengths) + 108)
    assert split.sample_tokens.tolist() == [length + 1 for length in lengths]


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-1024])
    elif how == "gone":
        path.unlink()
    elif how == "one bit":
        path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])


def read_all(folder):
    split = Corpus(folder).split("train")
    return [split.document(sample) for sample in range(split.samples)]


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("train-000002.tar", "truncated", r"train-000002.tar: truncated.*has [\d,]+ bytes, the index says [\d,]+"),
        ("train-000001.tar", "gone", "train-000001.tar: No such file"),
        (
            "train-000000.tar",
            "one bit",
            "train-000000.tar: damaged: its sha256 is [0-9a-f]{64}, the index says [0-9a-f]{64}",
        ),
        ("train.table.npy", "one bit", "train.table.npy: damaged"),
        ("tokenizer.json", "one bit", "tokenizer"),
        ("index.json", "gone", "no prepared corpus"),
        ("index.json", "truncated", "index.json cannot be read"),
    ],
)
def test_damaged_file_is_named_with_the_cure(build_corpus, name, how, message):
    folder = build_corpus(UNEVEN).folder
    damage(folder / name, how)
    with pytest.raises(UserError, match=message) as caught:
        read_all(folder)
    assert "launch.sh prepare" in str(caught.value)


def test_shard_is_hashed_once_and_again_after_it_changed(build_corpus, monkeypatch):
    folder = build_corpus(UNEVEN).folder
    hashed = []
    real = io.sha256_of
    monkeypatch.setattr(io, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    Corpus(folder).split("train").document(0)
    assert hashed == ["train-000000.tar"]
    Corpus(folder).split("train").document(3)
    assert hashed == ["train-000000.tar"]
    os.utime(folder / "train-000000.tar", ns=(1, 1))
    Corpus(folder).split("train").document(3)
    assert hashed == ["train-000000.tar"] * 2


def test_index_of_another_version_is_refused(build_corpus):
    folder = build_corpus(UNEVEN).folder
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Corpus(folder)


def test_fingerprint_depends_on_the_bytes_not_on_the_folder(build_corpus, tmp_path):
    corpus = build_corpus(UNEVEN)
    shutil.copytree(corpus.folder, tmp_path / "copy")
    assert Corpus(tmp_path / "copy").fingerprint == corpus.fingerprint
    assert build_corpus([[3]], name="other").fingerprint != corpus.fingerprint


def test_spans_of_many_shards_are_read_with_one_open_shard(build_corpus, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN", 1)
    split = build_corpus(UNEVEN).split("train")
    spans = DocSpans(np.array([0, 7, 8, 0, -1]), np.array([0, 0, 0, 1, 0]), np.array([2, 3, 1, 1, 4]))
    ids = np.ones(11, np.uint16)
    split.read_spans(spans, ids)
    first, second = split.document(0), split.document(7)
    assert ids.tolist() == [256, first[0], 256, second[0], second[1], 256, first[0], 0, 0, 0, 0]
