"""Source files: which are read and in what order, documents in spans, all problems reported at once."""

import gzip
import json
import os
import pickle
import socket
from itertools import chain

import pytest

from train.config import schema
from train.config.keys.data import TokenizerConfig
from train.data.corpus.shards import Corpus
from train.data.prepare.documents import LABEL, read_options, read_span
from train.data.prepare.prepare import prepare
from train.data.sources import row_files
from train.data.sources.problems import BadText, Problems, merged
from train.data.sources.source_files import describe_reading, list_files
from train.errors import UserError


def quiet(_event):
    pass


def names(data: schema.DataConfig) -> list[str]:
    return [file.name for file in list_files(data)]


def documents(data: schema.DataConfig) -> list:
    """The texts of all files, with their labels behind LABEL."""
    spans = (read_span(file, 0, file.size, read_options(data)) for file in list_files(data))
    return ["".join(pieces) for _, _, pieces in chain.from_iterable(spans)]


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
    data = schema.DataConfig(source="stdlib", tokenizer=TokenizerConfig(kind="bytes"))
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
    monkeypatch.setattr(row_files, "BLOCK", 16)
    texts = ["a" * length, "中" * 100, "\U0001f600" * 9, "b"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    data = text_data("a.jsonl")
    (file,) = list_files(data)
    for step in (7, 64, 1000):
        spans = [(begin, min(begin + step, file.size)) for begin in range(0, file.size, step)]
        documents = chain.from_iterable(read_span(file, begin, end, read_options(data)) for begin, end in spans)
        assert ["".join(pieces) for _, _, pieces in documents] == texts


def test_large_file_is_decoded_across_its_blocks(tmp_path, text_data, monkeypatch):
    monkeypatch.setattr(row_files, "BLOCK", 7)
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
        (b"\x80\x01token ids\x00", r"bad.txt: a binary file.*zero byte at offset 11"),
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
        (b'{"text": "a"', r"line 2 \(offset 17\) is not JSON \(Expecting"),
        (
            b'{"body": "a"}',
            r"offset 17\) has no text in the field 'text' \(its fields are \['body'\]\); set data.text_key",
        ),
        (b"[1]", r"offset 17\) has no text .*not an object, but a list"),
        (b'"a row"', r"offset 17\) has no text .*not an object, but a string"),
        (b'{"text": null}', r"line 2 \(offset 17\) has no text .*it is null(.|\n)*data\.bad_rows=skip"),
        (b'{"text": [{"role": "user"}]}', r"has no text .*it is a list"),
        (b'{"text": "a"},', "the comma at its end is too much"),
        (b'{"text": "a", "text": "b"}', "has the field 'text' twice"),
        (b'{"text": "half \\ud83d pair"}', r"has \\ud83d, half of a surrogate pair.*data\.encoding_errors=replace"),
        (b'{"text": "a", "d": ' + b"[" * 995 + b"]" * 995 + b"}", "is nested too deep"),
        (b'{"text": "a\x00"}', "has a zero byte"),
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


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.json"])
def test_rows_of_json_are_read_by_every_name_of_it(tmp_path, text_data, name):
    """Each spelled in another way: a mark in front, line ends of Windows, numbers and constants beyond Python's."""
    long = b'{"text": "two", "n": ' + b"9" * 5000 + b"}"
    rows = [b'\xef\xbb\xbf{"text": "one"}', long, b'{"x": NaN, "text": "\xe4\xb8\x89\\u0000"}']
    end = b"" if name == "a.json" else b"\r\n\xef\xbb\xbf\r\n"
    (tmp_path / name).write_bytes(b"\r\n".join(rows) + end)
    assert documents(text_data(name)) == ["one", "two", "三"]


@pytest.mark.parametrize("indent", [None, 2])
def test_array_of_records_is_read_in_blocks(tmp_path, text_data, indent, monkeypatch):
    rows = [{"text": f'中 {number} "[]{{}}\\', "more": [number, {"a": None}]} for number in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr("train.data.sources.records._BLOCK", block)
        assert documents(text_data("a.json")) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},]', r"line 1 \(offset 15\) is not JSON \(Expecting value\)"),
        ('[{"text": "a"}\n{"text": "b"}]', r"line 2 \(offset 15\) .*Expecting ',' or '\]'"),
        ('[{"text": "a"},\n {"text": "b"}', "the array is cut short"),
        ('[{"text": "a"}] {"text": "b"}', "text after the end of the array"),
        ('{"name": "trireme", "files": []}', r"no text in the field 'text' \(its fields are \['files', 'name'\]\)"),
        ("[" * 2000, "is nested too deep"),
    ],
)
def test_json_file_that_is_no_array_of_records_is_refused(tmp_path, text_data, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(text_data("a.json", bad_rows="refuse"), quiet)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), r"compressed by gzip; .*\.gz, or unpack it: gunzip -k "),
        ("x.txt", b"BZh91AY&SY", "compressed by bzip2"),
        ("x.txt", b"PAR1\x15\x04", r"a Parquet table; give it the ending \.parquet"),
        ("x.parquet", b"text", "not a Parquet table, for it does not begin as one"),
        ("x.arrow", b"PAR1\x15\x04", r"a Parquet table; give it the ending \.parquet"),
        ("x.bin", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer.*git lfs pull"),
        ("x.docx", b"PK\x03\x04\x14\x00", "a Word document"),
        ("x.zip", b"PK\x03\x04\x14\x00", "a zip archive; unpack it"),
        ("x.pdf", b"%PDF-1.7\n", "a PDF document; .*pdftotext"),
        ("x.txt", b"a.txt".ljust(257, b"\x00") + b"ustar", r"a tar archive; give it the ending \.tar"),
        ("x.npy", b"\x93NUMPY\x01\x00", "a NumPy array"),
        ("x.txt", pickle.dumps({"text": "a"}), "a Python pickle"),
        ("x.png", b"\x89PNG\r\n\x1a\n\x00", "a PNG image"),
        ("part-0", b'{"a": "b"}\n{"a": "c"}\n', r"rows of JSON, each a record; name it \.jsonl"),
        ("x.txt", b'{"text": "b"}\n{"text": "c"}\n', r"rows of JSON, each a record; name it \.jsonl"),
        ("x.jsonl", b'[\n{"text": "b"},\n{"text": "c"}\n]', r"not with a record on each line; .*\.json"),
        ("x.txt", "text".encode("utf-16"), "UTF-16 text, not UTF-8; convert it: iconv -f UTF-16 "),
        ("x.txt", "some text\n中文".encode("utf-16-le"), "iconv -f UTF-16LE "),
        ("x.txt", "some text\n中文".encode("utf-16-be"), "iconv -f UTF-16BE "),
        ("x.txt", "text".encode("utf-32"), "iconv -f UTF-32 "),
        ("x.txt", "text".encode("utf-32-be"), "iconv -f UTF-32BE "),
        ("x.jsonl", '{"text": "中"}\n{"text": "b"}'.encode("utf-16"), "iconv -f UTF-16 .*new.jsonl"),
    ],
)
def test_file_of_another_kind_is_named_with_its_cure(tmp_path, text_data, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare(text_data(name, bad_rows="skip"), quiet)
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "corpora").exists()


def test_text_that_resembles_another_kind_is_read(tmp_path, text_data):
    """A file of which the user says that it is text, and code."""
    for name, text in {"a.txt": '{"level": "info"}', "b.py": '{"a": 1}.get("a")\n', "c.md": "[{", "d": "PKs"}.items():
        (tmp_path / name).write_text(text)
    assert documents(text_data("*")) == ['{"level": "info"}', '{"a": 1}.get("a")\n', "[{", "PKs"]


def test_files_of_one_kind_make_one_complaint(tmp_path, text_data):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match=r"30 files \(00\.txt, 01\.txt, 02\.txt and 27 more\): each UTF-16") as caught:
        prepare(text_data("*.txt"), quiet)
    assert len(str(caught.value).splitlines()) == 2


def test_bad_rows_are_left_out_and_counted_if_asked_for(tmp_path, text_data):
    rows = ['{"text": "one"}', '{"text": null}', '{"text": ', '{"text": "two"}', '{"text": "\\ud83d"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    events = []
    data = text_data("a.jsonl", bad_rows="skip")
    corpus = Corpus(prepare(data, events.append))
    assert sum(corpus.split(split).samples for split in ("train", "val")) == 2
    notes = [event["text"] for event in events if event["phase"] == "note"]
    assert notes[0] == "each row is a document of 1 .jsonl"
    assert notes[1].startswith("3 rows left out (data.bad_rows=skip); the first: a.jsonl: line 2 (offset 16) has no")
    with pytest.raises(UserError, match="it is null"):
        prepare(text_data("a.jsonl"), quiet)  # the corpus without those rows is another


def test_problems_of_workers_are_bounded_and_arrive_whole():
    problems = Problems()
    for number in range(1000):
        problems.add(BadText("a.jsonl", f"problem {'x' * number}", number, row=True))
    problems.add(BadText("b", "of another kind", cure="see FILE"))
    arrived = pickle.loads(pickle.dumps(problems))
    assert len(arrived.groups) == 20
    assert merged([arrived, arrived]).count == 2002
    assert str(pickle.loads(pickle.dumps(BadText("b c", "of another kind", cure="see FILE")))) == (
        "b c: of another kind; see 'b c'"
    )


def test_labels_are_spelled_as_in_json(tmp_path, text_data):
    labels = ["true", "false", "3", "0.5", '"yes"', "12345678901234567890123"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "t", "label": {label}}}\n' for label in labels))
    data = text_data("a.jsonl", label_key="label")
    spelled = [label.strip('"') for label in labels]
    assert [text.partition(LABEL)[2] for text in documents(data)] == spelled
    classify = schema.Classify(name="classify", classes=[True, False, 3])
    assert classify.classes == ["true", "false", "3"]
    assert schema.Classify(name="classify").label_problem("nan")
    assert not schema.Classify(name="classify").label_problem("0.5")


def test_what_is_no_file_is_named_at_once(tmp_path, text_data):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "loop").symlink_to("loop")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "gone.jsonl").symlink_to(".git/annex/objects/x")
    with pytest.raises(UserError) as caught:
        list_files(text_data("folder", "/dev/stdin", "/dev/fd/0", "folder/pipe.txt", "folder/*.txt"))
    message = str(caught.value)
    for part in (
        "folder/pipe.txt: no file, but a named pipe",
        "folder/socket: no file, but a socket",
        "folder/loop: Too many levels",
        "folder/zero.txt: no file, but a device",
        "folder/gone.jsonl: a link to .git/annex/objects/x, which is not there; git annex get",
        "/dev/stdin: no file, but a stream",
        "/dev/fd/0: no file, but a stream",
    ):
        assert part in message


def test_links_to_folders_outside_are_followed_once(tmp_path, text_data):
    for name in ("text/a.txt", "text/deep/b.txt", "outside/c.txt", "outside/more/d.jsonl/part.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, target in {
        "text/x": "../outside",
        "text/y": "../outside/more",
        "text/deep/up": "..",
        "text/root": "/",
        "outside/back": "../text",
    }.items():
        (tmp_path / link).symlink_to(target)
    assert names(text_data("text")) == ["a.txt", "deep/b.txt", "x/c.txt", "x/more/d.jsonl/part.txt"]


def test_reading_is_described_by_endings(tmp_path, text_data):
    for name in ("a.jsonl", "b.md", "c.html", "d.html", "e"):
        (tmp_path / name).write_text(name)
    assert describe_reading(list_files(text_data(tmp_path))) == (
        "each row is a document of 1 .jsonl; each file is a document of 1 without an ending, 2 .html, 1 .md; "
        "the tags of .html are text too"
    )


def test_corpora_runs_and_sweeps_below_a_folder_are_no_text(tmp_path, text_data):
    written = [f"corpora/text-ab/{name}" for name in ("recipe.json", "index.json", "train-000000.tar")]
    written += [f"runs/a/{name}" for name in ("config.yaml", "environment.json", "run.json", "metrics.jsonl")]
    written += [f"sweeps/b/{name}" for name in ("ledger.jsonl", "sweep.lock", "000/config.yaml")]
    for name in ("a.txt", "notes/recipe.json", "notes/config.yaml", *written):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    assert names(text_data(tmp_path / "here")) == ["a.txt", "notes/config.yaml", "notes/recipe.json"]
    assert names(text_data(tmp_path / "here" / "runs" / "a")) == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "run.json",
    ]


def test_name_with_control_characters_is_shown_on_one_line(tmp_path, text_data):
    path = tmp_path / "a\n\x1b[31mred.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(UserError) as caught:
        prepare(text_data(path), quiet)
    assert "/a\\n\\x1b[31mred.txt: " in str(caught.value)


def test_label_as_long_as_a_text_is_not_repeated_as_a_whole():
    for classes in ([], ["good", "bad"]):
        problem = schema.Classify(name="classify", classes=classes).label_problem("x" * 1_000_000)
        assert "(1,000,000 characters)" in problem
        assert len(problem) < 300
