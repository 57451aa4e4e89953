"""Token ids that other programs made: the documents in them, and the tokenizer that has to be theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from train.data.corpus.shards import Corpus
from train.data.prepare.prepare import prepare
from train.data.sources import token_files
from train.data.sources.source_files import list_files
from train.errors import UserError

EOT = 300
DOCUMENTS = [list(range(number, number + 40)) for number in range(30)]


def quiet(_event):
    pass


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """A byte-level vocabulary with merges, of 301 ids: a text has other ids than those that the files hold."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate(signs)}
    pairs = [(sign, sign) for sign in signs[:44]]
    vocabulary |= {first + second: 256 + number for number, (first, second) in enumerate(pairs)}
    fast = Fast(models.BPE(vocab=vocabulary, merges=pairs))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "given" / "tokenizer.json"
    path.parent.mkdir()
    fast.save(str(path))
    return path


def write_plain(path: Path) -> None:
    """As nanoGPT's prepare.py: the end of text behind each document."""
    np.array([token for ids in DOCUMENTS for token in [*ids, EOT]], np.uint16).tofile(path)


def write_llmc(path: Path, dtype: type = np.uint16) -> None:
    """As llm.c's write_datafile: the end of text before each document."""
    ids = np.array([token for document in DOCUMENTS for token in [EOT, *document]], dtype)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520 if dtype is np.uint16 else 20240801, 1, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())


def write_megatron(path: Path, dtype: type = np.int32) -> None:
    """As Megatron's IndexedDatasetBuilder: two sequences a document, the end of text behind each document."""
    sequences = [part for ids in DOCUMENTS for part in (ids[:25], [*ids[25:], EOT])]
    np.concatenate(sequences).astype(dtype).tofile(path)
    lengths = np.array([len(part) for part in sequences], np.int32)
    pointers = (np.cumsum(lengths) - lengths).astype(np.int64) * np.dtype(dtype).itemsize
    code = {np.int32: 4, np.uint16: 8}[dtype]
    head = b"MMIDIDX\x00\x00" + np.uint64(1).tobytes() + bytes([code])
    head += np.uint64(len(sequences)).tobytes() + np.uint64(len(DOCUMENTS) + 1).tobytes()
    documents = np.arange(0, 2 * len(DOCUMENTS) + 1, 2, np.int64)
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + documents.tobytes())


@pytest.mark.parametrize(
    "write",
    [
        write_plain,
        write_llmc,
        lambda path: write_llmc(path, np.uint32),
        write_megatron,
        lambda path: write_megatron(path, np.uint16),
    ],
    ids=["nanogpt", "llmc", "llmc-32", "megatron", "megatron-16"],
)
def test_ids_are_stored_as_they_are(tmp_path, text_data, tokenizer, write):
    write(tmp_path / "a.bin")
    assert [file.name for file in list_files(text_data("*"))] == ["a.bin", "given/tokenizer.json"]
    data = text_data("a.bin", kind="file", tokenizer_path=str(tokenizer), val_fraction=0.0)
    split = Corpus(prepare(data, quiet)).split("train")
    assert [split.document(sample).tolist() for sample in range(split.samples)] == DOCUMENTS
    assert split.text_bytes.tolist() == [40] * 30


def test_documents_do_not_depend_on_blocks(tmp_path, monkeypatch):
    write_plain(tmp_path / "a.bin")
    write_megatron(tmp_path / "b.bin")
    expected = [(41 * number, 40) for number in range(30)]
    for block in (1, 7, 41, 1 << 20):
        monkeypatch.setattr(token_files, "_BLOCK", block)
        for name in ("a.bin", "b.bin"):
            assert list(token_files.scan(str(tmp_path / name), EOT, 301)) == expected


def test_borders_of_megatron_part_documents_without_an_end_of_text(tmp_path, text_data, tokenizer):
    write_megatron(tmp_path / "a.bin")
    content = np.fromfile(tmp_path / "a.bin", np.int32)
    content[content == EOT] = 5
    content.tofile(tmp_path / "a.bin")
    assert list(token_files.scan(str(tmp_path / "a.bin"), EOT, 301)) == [(41 * number, 41) for number in range(30)]


def test_file_without_an_end_of_text_is_cut_for_the_held_out_split(tmp_path, text_data, tokenizer):
    (np.arange(100, dtype=np.uint16) % 90).tofile(tmp_path / "a.bin")
    corpus = Corpus(prepare(text_data("a.bin", kind="file", tokenizer_path=str(tokenizer), val_fraction=0.1), quiet))
    assert corpus.split("train").document(0).tolist() == list(range(90))
    assert corpus.split("val").document(0).tolist() == list(range(10))
    assert corpus.split("train").bytes + corpus.split("val").bytes == 100


def test_ids_without_their_tokenizer_are_refused(tmp_path, text_data):
    write_plain(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a.bin: token ids, .*without the tokenizer .*data\.tokenizer\.kind=file"):
        prepare(text_data("a.bin"), quiet)


def test_id_beyond_the_vocabulary_is_named(tmp_path, text_data, tokenizer):
    np.array([5, 6, 301], np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a.bin: holds the id 301 \(token 2\), and the tokenizer .* has 301; name the"):
        prepare(text_data("a.bin", kind="file", tokenizer_path=str(tokenizer)), quiet)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.write_bytes(b"abc"), "its 3 bytes are no whole number of ids"),
        (
            lambda path: (write_llmc(path), path.write_bytes(path.read_bytes()[:-2])),
            "is cut short: its header tells of",
        ),
        (lambda path: (write_megatron(path), path.write_bytes(path.read_bytes()[:-4])), "not the file of .*a.idx"),
        (
            lambda path: (write_megatron(path), path.with_suffix(".idx").write_bytes(b"MM")),
            "which is none of Megatron's",
        ),
    ],
)
def test_broken_file_of_ids_is_named(tmp_path, text_data, tokenizer, break_it, message):
    break_it(tmp_path / "a.bin")
    with pytest.raises(UserError, match=f"a.bin: .*{message}"):
        prepare(text_data("a.bin", kind="file", tokenizer_path=str(tokenizer)), quiet)
