"""Every format gives the documents of the others, and broken files are named with the row or member."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from train.data.corpus.shards import Corpus
from train.data.prepare.documents import read_options, read_span
from train.data.prepare.prepare import find_prepared, prepare
from train.data.sources import arrow_tables, local_copies, row_files
from train.data.sources.source_files import describe_reading, list_files
from train.errors import UserError

ROWS = [
    {"text": f'{number}: "Ehre", 中文,\tand a\nsecond line', "name": f"doc/{number}", "lang": "en", "n": number}
    for number in range(120)
]
COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: b"".join(
        zstandard.ZstdCompressor().compress(part) for part in (content[:1000], content[1000:])
    ),
}


def quiet(_event):
    pass


def jsonl(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["n", "text", "name", "lang"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    return file.getvalue()


def records_tar() -> bytes:
    return tar_of({f"./part/{row['n']:03d}.json": json.dumps(row).encode() for row in ROWS})


def texts_tar() -> bytes:
    about = {f"{row['n']:03d}.json": json.dumps({**row, "text": "of the record"}).encode() for row in ROWS}
    texts = {f"{row['n']:03d}.txt": row["text"].encode() for row in ROWS}
    return tar_of({name: (about | texts)[name] for name in sorted(about | texts)})


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=33)
    return file.getvalue()


def arrow(stream: bool) -> bytes:
    file, rows = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=50)
    return file.getvalue()


FORMATS = {
    "a.jsonl": jsonl,
    "a.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "a.csv": lambda: table(","),
    "a.tsv": lambda: table("\t"),
    "a.parquet": parquet,
    "a.arrow": lambda: arrow(False),
    "stream.arrow": lambda: arrow(True),
    "records.tar": records_tar,
    "texts.tar": texts_tar,
    **{f"a.jsonl.{ending}": lambda press=press: press(jsonl()) for ending, press in COMPRESSORS.items()},
    "a.tar.gz": lambda: gzip.compress(records_tar()),
    "a.parquet.zst": lambda: COMPRESSORS["zst"](parquet()),
}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_makes_the_same_shards(tmp_path, text_data, name, monkeypatch):
    monkeypatch.setattr(arrow_tables, "_BATCH", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / name).write_bytes(FORMATS[name]())
    keys = {"name_key": "name", "meta_keys": ["lang"], "shard_tokens": 1000}
    folders = [
        prepare(text_data(file, dir=f"out/{number}", **keys), quiet) for number, file in enumerate(["a.jsonl", name])
    ]
    expected, shards = map(shard_bytes, folders)
    assert len(expected) > 3
    assert shards == expected
    assert not list((tmp_path / "out").glob(f"{local_copies.PREFIX}*"))
    assert find_prepared(text_data(name, dir="out/1", **keys)) == folders[1]


def test_rows_are_loaded_again_in_any_order(tmp_path, text_data, monkeypatch):
    monkeypatch.setattr(arrow_tables, "_BATCH", 1000)
    for name in ("a.csv", "a.parquet", "a.arrow", "stream.arrow", "records.tar", "texts.tar", "a.json"):
        (tmp_path / name).write_bytes(FORMATS[name]())
        (file,) = list_files(text_data(name))
        places = [place[:2] for place in row_files.scan_rows(file, (0, file.size), ["text"], "strict")]
        for number in (0, 119, 5, 4, 60, 61, 118):
            row = row_files.load_row(file, places[number], ["text"], "strict")
            assert row["text"] == ROWS[number]["text"], (name, number)


def test_rows_have_all_their_fields_without_a_choice(tmp_path, text_data):
    for name in ("a.jsonl", "a.parquet", "stream.arrow", "records.tar"):
        (tmp_path / name).write_bytes(FORMATS[name]())
        (file,) = list_files(text_data(name))
        assert [load() for _, _, load in row_files.scan_rows(file, (0, file.size), [], "strict")] == ROWS


def test_workers_unpack_files_and_keep_the_order(tmp_path, text_data):
    for number in range(4):
        (tmp_path / f"{number}.jsonl.zst").write_bytes(COMPRESSORS["zst"](jsonl(ROWS[number * 30 :][:30])))
    (tmp_path / "all.jsonl").write_bytes(jsonl())
    one = prepare(text_data("all.jsonl", dir="one", name_key="name"), quiet)
    two = prepare(text_data("*.zst", dir="two", name_key="name", workers=2), quiet)
    assert shard_bytes(one) == shard_bytes(two)


def test_names_and_fields_of_rows_are_stored_beside_them(tmp_path, text_data):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:3]))
    keys = {"name_key": "name", "meta_keys": ["lang", "n", "absent"], "val_fraction": 0.0}
    split = Corpus(prepare(text_data("a.jsonl", **keys), quiet)).split("train")
    assert [split.source(sample) for sample in range(3)] == ["doc/0", "doc/1", "doc/2"]
    assert split.about(1) == {"source": "doc/1", "bytes": split.text_bytes[1], "lang": "en", "n": 1}


def test_folder_of_save_to_disk_is_read_by_its_state(tmp_path, text_data):
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "dataset_info.json").write_text("{}")
    (folder / "data-00000-of-00001.arrow").write_bytes(arrow(True))
    (folder / "cache-1.arrow").write_bytes(b"left by a map")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert [file.name for file in list_files(text_data("set"))] == ["train/data-00000-of-00001.arrow"]
    assert [file.name for file in list_files(text_data("set/train"))] == ["data-00000-of-00001.arrow"]
    (folder / "state.json").write_text('{"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(UserError, match=r"state.json: .*chosen by indices.*flatten_indices"):
        list_files(text_data("set"))


def test_text_of_another_encoding_is_read_by_choice(tmp_path, text_data):
    (tmp_path / "a.txt").write_bytes("床前明月光".encode("gb18030"))
    (tmp_path / "b.jsonl").write_bytes('{"text": "疑是地上霜"}\n{"text": "举头"}'.encode("gb18030"))
    data = text_data("a.txt", "b.jsonl", encoding="gb18030", val_fraction=0.0)
    corpus = Corpus(prepare(data, quiet))
    texts = [corpus.tokenizer.decode(corpus.split("train").document(n).tolist()) for n in range(3)]
    assert texts == ["床前明月光", "疑是地上霜", "举头"]
    (tmp_path / "c.txt").write_bytes("wide".encode("utf-16"))
    assert Corpus(prepare(text_data("c.txt", encoding="utf-16"), quiet)).split("train").bytes
    with pytest.raises(UserError, match=r"c.txt: not text in data.encoding=ascii: byte 0xff at or behind offset 0"):
        prepare(text_data("c.txt", encoding="ascii"), quiet)
    with pytest.raises(ValueError, match="no encoding of text that Python knows"):
        text_data("a.txt", encoding="base64")


def test_first_documents_are_those_of_the_whole(tmp_path, text_data):
    (tmp_path / "a.parquet").write_bytes(parquet())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"no rows\n"))  # never reached
    corpus = Corpus(prepare(text_data("a.parquet", "b.jsonl.gz", max_documents=7, val_fraction=0.0), quiet))
    texts = [corpus.tokenizer.decode(corpus.split("train").document(n).tolist()) for n in range(7)]
    assert texts == [row["text"] for row in ROWS[:7]]
    assert corpus.split("train").samples == 7


def broken_parquet() -> bytes:
    content = bytearray(parquet())
    middle = len(content) // 3
    content[middle : middle + 200] = bytes(200)
    return bytes(content)


def tar_with(kind: bytes, name: str, link: str = "") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member)
    return file.getvalue()


BROKEN = {
    "cut.jsonl.zst": (lambda: COMPRESSORS["zst"](jsonl())[:-30], "broken or cut short: the last frame has no end"),
    "bad.jsonl.zst": (lambda: b"\x28\xb5\x2f\xfd" + b"abc" * 99, "broken or cut short: .* behind 0 bytes of what zstd"),
    "cut.jsonl.gz": (
        lambda: gzip.compress(jsonl())[:-30],
        "broken or cut short: Compressed file ended",
    ),
    "cut.jsonl.bz2": (lambda: bz2.compress(jsonl())[:-30], "broken or cut short.*bzip2 unpacks; get the file again"),
    "cut.jsonl.xz": (lambda: lzma.compress(jsonl())[:-30], "broken or cut short.*xz unpacks"),
    "not.jsonl.xz": (jsonl, "broken or cut short"),
    "cut.parquet": (lambda: parquet()[:-50], r"cut.parquet: row 1 is broken, and what follows cannot be read"),
    "holes.parquet": (broken_parquet, r"holes.parquet: row \d+ is broken, and what follows cannot be read"),
    "cut.arrow": (lambda: arrow(False)[:-100], r"cut.arrow: row 1 is broken"),
    "cut2.arrow": (lambda: arrow(True)[:-400], r"cut2.arrow: row \d+ is broken, and what follows"),
    "cut.tar": (lambda: records_tar()[:30_000], r"cut.tar: the tar is broken or cut short behind the member './part/"),
    "link.tar": (lambda: tar_with(tarfile.SYMTYPE, "a.txt", "/etc/passwd"), "holds 'a.txt', a link to '/etc/passwd'"),
    "hard.tar": (lambda: tar_with(tarfile.LNKTYPE, "a.txt", "b"), "holds 'a.txt', a link to 'b'"),
    "up.tar": (lambda: tar_of({"x/../../a.txt": b"a"}), r"holds 'x/../../a.txt', a name that leads out"),
    "root.tar": (lambda: tar_of({"/a.txt": b"a"}), "holds '/a.txt', a name that leads out"),
    "pipe.tar": (lambda: tar_with(tarfile.FIFOTYPE, "a.txt"), "which is a device or a pipe"),
    "empty.tar": (lambda: b"", "the tar is broken or cut short at its start"),
    "image.tar": (lambda: tar_of({"k.jpg": b"x", "k.cls": b"3"}), "the sample 'k' has no text: .* .cls, .jpg"),
    "json.tar": (
        lambda: tar_of({"k.json": b'{"body": "b"}'}),
        r"'k' has no text: .*the fields \[.body.\]; data.",
    ),
    "bad.tar": (lambda: tar_of({"k.json": b'{"text": '}), "the sample 'k' is not JSON"),
    "fields.csv": (
        lambda: b"text,b\none\n",
        r"fields.csv: line 2 \(offset 7\) has 1 fields, .*names 2",
    ),
    "quote.csv": (lambda: b'text\n"never closed\n', r"line 2 .*is no row of separated values"),
    "bytes.csv": (lambda: b"text\nfine\nbad \xff\n", r"line 3 .*byte 0xff is not UTF-8.*encoding_errors=replace"),
    "zero.csv": (lambda: b"text\nfine text\na\0b\n", r"line 3 \(offset 15\) has a zero byte"),
    "twice.csv": (lambda: b"text,text\na,b\n", "has the column 'text' twice"),
    "column.csv": (lambda: b"body,b\none,two\n", r"no text in the field 'text' \(its fields are \['b', 'body'\]\)"),
    "line.jsonl.zst": (lambda: COMPRESSORS["zst"](jsonl()[:300] + b"\n{\n"), r"line.jsonl.zst: line \d+ .*is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_with_its_row(tmp_path, text_data, name):
    make, message = BROKEN[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(UserError, match=message):
        prepare(text_data(name), quiet)
    assert not (tmp_path / "corpora").exists()


def test_table_without_the_column_is_refused_once(tmp_path, text_data):
    (tmp_path / "a.parquet").write_bytes(parquet())
    with pytest.raises(
        UserError, match=r"a.parquet: no column 'body', .*'name', 'text'\]; set data.text_key"
    ) as caught:
        prepare(text_data("a.parquet", text_key="body"), quiet)
    assert len(str(caught.value).splitlines()) == 2


def test_null_in_a_table_is_a_bad_row(tmp_path, text_data):
    rows = pyarrow.Table.from_pylist([{"text": "one"}, {"text": None}, {"text": "three"}])
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: row 2 has no text in the field 'text': it is null"):
        prepare(text_data("a.parquet"), quiet)
    folder = prepare(text_data("a.parquet", bad_rows="skip"), quiet)
    (skipped,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert skipped["place"] == "row 2"


def test_bad_files_and_rows_are_set_aside_and_listed(tmp_path, text_data):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl())[:-30])
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_bytes(b"\x89PNG\r\n\x1a\n")
    events = []
    folder = prepare(text_data("a.jsonl", "b.jsonl.gz", "c.txt", "d.txt", bad="skip"), events.append)
    corpus = Corpus(folder)
    assert sum(corpus.split(split).samples for split in ("train", "val")) == 2
    listed = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [Path(row["file"]).name for row in listed] == ["a.jsonl", "b.jsonl.gz", "c.txt", "d.txt"]
    assert listed[0]["offset"] == 16
    assert "a PNG image" in listed[3]["problem"]
    assert any("4 rows or files left out" in event.get("text", "") for event in events)
    assert find_prepared(text_data("a.jsonl", "b.jsonl.gz", "c.txt", "d.txt", bad="skip")) == folder


def test_folder_of_copies_of_a_killed_process_is_deleted(tmp_path, text_data):
    left = tmp_path / "corpora" / f"{local_copies.PREFIX}x"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "0000000.jsonl").write_text("half")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl()))
    prepare(text_data("a.jsonl.gz"), quiet)
    assert not left.exists()


def test_disk_that_is_full_while_unpacking_is_named(tmp_path, text_data, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl()))
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device, while .*a.jsonl.gz was being unpacked"):
        prepare(text_data("a.jsonl.gz"), quiet)


def test_what_is_compressed_is_unpacked_in_bounded_memory(tmp_path, text_data):
    """100 MB of text out of some kilobytes, under a limit of address space that has no room for them."""
    with lzma.open(tmp_path / "a.jsonl.xz", "wb", preset=0) as file:
        for number in range(1000):
            file.write(json.dumps({"text": f"{number}" + "x" * 100_000}).encode() + b"\n")
    code = (
        "import resource, sys\n"
        "from train.data.sources import source_files, local_copies\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "file = source_files.SourceFile(sys.argv[1], 'a', 1, 1, local=sys.argv[1] + '.copy')\n"
        "local_copies.make_copy(file, 'utf-8', 'strict')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl.xz")], env=environment, capture_output=True, check=True
    )
    assert (tmp_path / "a.jsonl.xz.copy").stat().st_size > 100_000_000
    assert int(run.stdout) < 40_000  # kilobytes


def test_reading_names_every_kind(tmp_path, text_data):
    for name in ("a.jsonl.gz", "b.parquet", "c.tar", "d.txt.zst", "e.md"):
        (tmp_path / name).write_bytes(b"x")
    assert describe_reading(list_files(text_data(tmp_path))) == (
        "each row is a document of 1 .jsonl.gz, 1 .parquet; each file is a document of 1 .md, 1 .txt.zst; "
        "each sample is a document of 1 .tar"
    )


def test_labels_are_read_from_tables(tmp_path, text_data):
    (tmp_path / "a.csv").write_text("text,stars\ngood,5\nbad,1\n")
    data = text_data("a.csv", label_key="stars")
    spans = (read_span(file, 0, file.size, read_options(data)) for file in list_files(data))
    assert ["".join(pieces) for _, _, pieces in chain.from_iterable(spans)] == ["good\x1e5", "bad\x1e1"]
