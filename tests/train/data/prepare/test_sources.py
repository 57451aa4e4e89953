"""Source files: which are read and in what order, documents in spans, all problems reported at once."""

import json
from itertools import chain

import pytest

from train.config import schema
from train.data.corpus.shards import Corpus
from train.data.prepare import sources
from train.data.prepare.prepare import prepare
from train.data.prepare.sources import BadText, list_files, read_options, read_span
from train.errors import UserError


def quiet(_event):
    pass


def names(data: schema.DataConfig) -> list[str]:
    return [file.name for file in list_files(data)]


def test_folders_globs_and_files_are_listed_once_and_in_order(tmp_path, text_data):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", ".hidden", ".git/e.txt"):
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert names(text_data(tmp_path / "text")) == ["a.txt", "b.txt", "deep/d.md", "deep/er/c.txt"]
    assert names(text_data("text/*.txt", "text")) == ["a.txt", "b.txt", "deep/d.md", "deep/er/c.txt"]
    assert names(text_data("text/**/*.txt")) == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert names(text_data("text/b.txt", "text/a.txt", "text/b.txt")) == ["b.txt", "a.txt"]


def test_standard_library_is_listed_without_its_tests():
    data = schema.DataConfig(source="stdlib", tokenizer=schema.TokenizerConfig(kind="bytes"))
    files = list_files(data)
    assert "argparse.py" in [file.name for file in files]
    assert sum(file.size for file in files) > 5_000_000
    assert not [file.name for file in files if {"test", "site-packages"} & set(file.name.split("/"))]


def test_lines_belong_to_the_span_they_begin_in(tmp_path, text_data):
    path = tmp_path / "a.jsonl"
    texts = [f"text {'x' * (number % 7)} {number}" for number in range(50)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "\n")
    data = text_data(path)
    (file,) = list_files(data)
    for step in (1, 7, 64, 10_000):
        spans = [(begin, min(begin + step, file.size)) for begin in range(0, file.size, step)]
        documents = chain.from_iterable(read_span(file, begin, end, read_options(data)) for begin, end in spans)
        assert ["".join(pieces) for _, _, pieces in documents] == texts


@pytest.mark.parametrize("length", [1, 50, 300])
def test_long_lines_are_read_once_whatever_the_span(tmp_path, text_data, monkeypatch, length):
    monkeypatch.setattr(sources, "_BLOCK", 16)
    texts = ["a" * length, "中" * 100, "\U0001f600" * 9, "b"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    data = text_data("a.jsonl")
    (file,) = list_files(data)
    for step in (7, 64, 1000):
        spans = [(begin, min(begin + step, file.size)) for begin in range(0, file.size, step)]
        documents = chain.from_iterable(read_span(file, begin, end, read_options(data)) for begin, end in spans)
        assert ["".join(pieces) for _, _, pieces in documents] == texts


def test_large_file_is_decoded_across_its_blocks(tmp_path, text_data, monkeypatch):
    monkeypatch.setattr(sources, "_BLOCK", 7)
    (tmp_path / "a.txt").write_text("中文é\U0001f600 " * 20)
    (tmp_path / "bad.txt").write_bytes("中".encode() * 10 + b"\xff")
    data = text_data("a.txt", "bad.txt")
    good, bad = list_files(data)
    texts = ["".join(pieces) for _, _, pieces in read_span(good, 0, good.size, read_options(data))]
    assert texts == [("中文é\U0001f600 " * 20).rstrip()]
    with pytest.raises(BadText, match=r"byte 0xff at offset 30 is not UTF-8"):
        ["".join(pieces) for _, _, pieces in read_span(bad, 0, bad.size, read_options(data))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine so far \xff\xfe then not", r"bad.txt: byte 0xff at offset 12 .*data.encoding_errors=replace"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", r"bad.txt: a binary file.*zero byte at offset 8"),
        ("text".encode("utf-16"), r"bad.txt: a binary file.*UTF-16"),
    ],
)
def test_bytes_that_are_not_text_are_reported_with_their_offset(tmp_path, text_data, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(text_data(tmp_path / "bad.txt"), quiet)
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line at offset 17 is not JSON"),
        (
            b'{"body": "a"}',
            r"offset 17 has no text in the field 'text' \(its fields are \['body'\]\); set data.text_key",
        ),
        (b"[1]", "offset 17 has no text .*not an object"),
        (b'{"text": "\xc3("}', "byte 0xc3 at offset 27"),
    ],
)
def test_bad_json_line_is_reported_with_its_offset(tmp_path, text_data, line, message):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        prepare(text_data(tmp_path / "bad.jsonl"), quiet)


def test_all_problems_are_reported_at_once_and_counted(tmp_path, text_data):
    for number in range(25):
        (tmp_path / f"{number:02d}.txt").write_bytes(b"\xff")
    with pytest.raises(UserError) as caught:
        prepare(text_data(*(tmp_path / f"{number:02d}.txt" for number in range(25))), quiet)
    lines = str(caught.value).splitlines()
    assert sum("not UTF-8" in line for line in lines) == 20
    assert lines[-1] == "  - ... and 5 more"


def test_undecodable_bytes_can_be_replaced(tmp_path, text_data):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and more text to hold")
    corpus = Corpus(prepare(text_data(tmp_path / "a.txt", encoding_errors="replace", val_fraction=0.0), quiet))
    text = corpus.tokenizer.decode(corpus.split("train").document(0).tolist())
    assert text == "caf\ufffd and more text to hold"


def test_all_missing_paths_are_named(tmp_path, text_data):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dangling.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    with pytest.raises(UserError) as caught:
        prepare(text_data("missing.txt", "none/*.txt", tmp_path / "folder", tmp_path / "ring"), quiet)
    message = str(caught.value)
    for part in (
        "missing.txt: there is no such file",
        "none/*.txt: the pattern matches no file",
        "dangling.txt",
        "ring: ",
    ):
        assert part in message


def test_file_that_the_system_will_not_read_is_named(text_data):
    with pytest.raises(UserError, match="/proc/self/mem: "):
        prepare(text_data("/proc/self/mem"), quiet)


@pytest.mark.parametrize("paths", [[], ["empty"], ["blank.txt"]])
def test_empty_corpus_is_refused(tmp_path, text_data, paths):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\t\n\x07")
    with pytest.raises(UserError, match=r"empty"):
        prepare(text_data(*paths), quiet)
    assert not (tmp_path / "corpora").exists()
