"""Fixtures of the data tests: hand-made corpora and data sections."""

from pathlib import Path

import numpy as np
import pytest

from train.config import schema
from train.config.keys.data import TokenizerConfig
from train.data import tokenizer
from train.data.corpus import shards
from train.data.corpus.verified_files import VerifiedFiles
from train.util import io


@pytest.fixture
def build_corpus(tmp_path):
    """build_corpus(train, val) writes a corpus whose shards hold documents of the given lengths, in bytes."""

    def build(train: list[list[int]], val: list[list[int]] = (), name: str = "corpus") -> shards.Corpus:
        folder = tmp_path / name
        folder.mkdir()
        verified = VerifiedFiles(folder)
        content = tokenizer.build_tokenizer(TokenizerConfig(kind="bytes"), [], "")
        io.write_whole(folder / tokenizer.FILE, content.encode())
        loaded = tokenizer.load_tokenizer(folder)
        random = np.random.default_rng(0)
        splits = {}
        for split, lengths in (("train", train), ("val", val)):
            entries, tables, first = [], [np.zeros((3, 0), np.int64)], 0
            for number, sizes in enumerate(lengths):
                texts = [bytes(random.integers(97, 123, size, dtype=np.uint8)) for size in sizes]
                documents = [(f"d{i}", len(t), [np.array([256, *t, 256])]) for i, t in enumerate(texts)]
                entry, table = shards.write_shard(
                    folder / f"{split}-{number:06d}.tar", first, np.dtype("uint16"), documents
                )
                entries.append(entry)
                tables.append(table)
                first += len(sizes)
            table_entry = shards.write_table(folder, split, np.concatenate(tables, axis=1), verified)
            splits[split] = shards.split_entry(entries, table_entry)
        shards.write_index(folder, {"recipe": "made by hand", "settings": {}}, loaded, "uint16", splits)
        return shards.Corpus(folder)

    return build


@pytest.fixture
def text_data(tmp_path, monkeypatch):
    """text_data(*paths, ...) returns the data section for some text files, in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def data(*paths: Path | str, kind: str = "bytes", vocab_size: int | None = None, **keys) -> schema.DataConfig:
        given = {"path": keys.pop("tokenizer_path", None), "max_unknown": keys.pop("max_unknown", None)}
        section = TokenizerConfig(kind=kind, vocab_size=vocab_size, **given)
        keys = {"workers": 1, **keys}
        return schema.DataConfig(source="text", paths=[str(path) for path in paths], tokenizer=section, **keys)

    return data
