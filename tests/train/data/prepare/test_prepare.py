"""Preparing: equal input gives equal bytes whatever interrupts it; finished work is never lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models

from train.data.corpus.shards import Corpus
from train.data.prepare import prepare as module
from train.data.prepare.clean import clean
from train.data.prepare.prepare import find_prepared, prepare
from train.errors import UserError

ROOT = Path(__file__).parents[4]


def quiet(_event):
    pass


def write_lines(path: Path, count: int, words: int = 60) -> Path:
    """A .jsonl file of ``count`` different documents of ``words`` random words."""
    random = np.random.default_rng(count)
    vocabulary = ["床前", "明月光", "def", "return", "self", "the", "of", "rank", "\n", "x = 1"]
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(random.choice(vocabulary, words)) + f" {number}"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def texts(corpus: Corpus, split: str) -> list[str]:
    shards = corpus.split(split)
    return [corpus.tokenizer.decode(shards.document(sample).tolist()) for sample in range(shards.samples)]


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a corpus that readers use, by name."""
    shown = [*folder.glob("*.tar"), *folder.glob("*.npy"), folder / "index.json", folder / "tokenizer.json"]
    return {path.name: path.read_bytes() for path in sorted(shown)}


def test_shards_hold_the_cleaned_text(tmp_path, text_data):
    path = write_lines(tmp_path / "a.jsonl", 200)
    corpus = Corpus(prepare(text_data(path, kind="bpe", vocab_size=400, shard_tokens=2000), quiet))
    expected = {json.loads(line)["text"] for line in path.read_text().splitlines()}
    train, val = texts(corpus, "train"), texts(corpus, "val")
    assert len(train) + len(val) == 200
    assert set(train) | set(val) == {clean(text) for text in expected}
    assert len(corpus.split("train").entries) > 3
    assert corpus.split("val").bytes == sum(len(text.encode()) for text in val)


def test_second_prepare_reads_no_text(tmp_path, text_data, monkeypatch):
    data = text_data(write_lines(tmp_path / "a.jsonl", 100))
    assert find_prepared(data) is None
    folder = prepare(data, quiet)
    assert find_prepared(data) == folder
    monkeypatch.setattr(module, "build_spec", None)  # reading the text again would fail
    events = []
    assert prepare(data, events.append) == folder
    assert events == [{"phase": "ready", "folder": str(folder), "new": False}]


def test_progress_is_reported_by_phase_and_ends_at_its_total(tmp_path, text_data):
    events = []
    prepare(text_data(write_lines(tmp_path / "a.jsonl", 300), shard_tokens=3000), events.append)
    assert list(dict.fromkeys(event["phase"] for event in events)) == ["note", "read", "tokenizer", "tokenize", "ready"]
    for phase in ("read", "tokenize"):
        last = [event for event in events if event["phase"] == phase][-1]
        assert last["done"] == last["total"] > 0


def test_default_folder_is_named_after_the_text(tmp_path, text_data):
    write_lines(tmp_path / "a.jsonl", 50)
    first = prepare(text_data("a.jsonl"), quiet)
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert find_prepared(text_data("a.jsonl")) is None
    assert prepare(text_data("a.jsonl"), quiet) == first  # the text is read again and is the same
    assert find_prepared(text_data("a.jsonl")) == first
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    second = prepare(text_data("a.jsonl"), quiet)
    assert second != first
    assert Corpus(second).fingerprint != Corpus(first).fingerprint
    assert prepare(text_data("a.jsonl", shard_tokens=999), quiet) not in (first, second)


def test_folder_of_another_corpus_is_left_alone(tmp_path, text_data):
    write_lines(tmp_path / "a.jsonl", 50)
    folder = prepare(text_data("a.jsonl", dir="here"), quiet)
    before = content(folder)
    with pytest.raises(UserError, match=r"other settings \(data.val_fraction\).*another data.dir"):
        prepare(text_data("a.jsonl", dir="here", val_fraction=0.5), quiet)
    write_lines(tmp_path / "a.jsonl", 51)
    with pytest.raises(UserError, match=r"corpus of other text"):
        prepare(text_data("a.jsonl", dir="here"), quiet)
    assert content(folder) == before


def test_duplicates_are_dropped_across_files(tmp_path, text_data):
    for name, text in {"a": "same  \ntext here", "b": "another text", "c": "same\ntext here", "d": "third"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = Corpus(prepare(text_data("*.txt"), quiet))
    assert sorted(texts(corpus, "train") + texts(corpus, "val")) == ["another text", "same\ntext here", "third"]
    corpus = Corpus(prepare(text_data("*.txt", dedup=False), quiet))
    assert len(texts(corpus, "train") + texts(corpus, "val")) == 4


def test_document_stays_in_its_split_when_others_are_added(tmp_path, text_data):
    write_lines(tmp_path / "a.jsonl", 400)
    before = set(texts(Corpus(prepare(text_data("a.jsonl", val_fraction=0.2), quiet)), "val"))
    write_lines(tmp_path / "b.jsonl", 300)
    after = set(texts(Corpus(prepare(text_data("b.jsonl", "a.jsonl", val_fraction=0.2), quiet)), "val"))
    assert before < after
    assert 0.12 * 400 < len(before) < 0.28 * 400


def test_neither_split_is_empty_with_two_documents(tmp_path, text_data):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("other")
    for fraction in (0.001, 0.999):
        corpus = Corpus(prepare(text_data("*.txt", val_fraction=fraction), quiet))
        assert len(texts(corpus, "train")) == len(texts(corpus, "val")) == 1


def test_single_document_is_cut_and_its_end_held_out(tmp_path, text_data):
    text = "".join(chr(ord("a") + number % 26) for number in range(1000)) + "中"
    (tmp_path / "a.txt").write_text(text)
    corpus = Corpus(prepare(text_data("a.txt", val_fraction=0.1, kind="chars"), quiet))
    assert texts(corpus, "train") == [text[:900]]
    assert texts(corpus, "val") == [text[900:]]
    assert corpus.tokenizer.vocab_size == 28  # of the whole text, and the end token
    assert corpus.split("val").bytes == len(text[900:].encode())


def test_document_that_is_most_of_the_text_is_cut_and_the_others_are_not(tmp_path, text_data):
    small = [f"small {number}" for number in range(8)]
    for number, text in enumerate(small):
        (tmp_path / f"{number}.txt").write_text(text)
    large = "".join(chr(0x4E00 + number) for number in range(1000))
    (tmp_path / "large.txt").write_text(large)
    corpus = Corpus(prepare(text_data("*.txt", val_fraction=0.1, test_fraction=0.1, workers=1), quiet))
    splits = {name: texts(corpus, name) for name in ("train", "val", "test")}
    parts = [text for name in splits for text in splits[name] if text not in small]
    assert parts == [large[:800], large[800:900], large[900:]]
    assert sorted(text for split in splits.values() for text in split if text in small) == small


def test_single_document_has_a_test_split_if_one_is_wanted(tmp_path, text_data):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    corpus = Corpus(prepare(text_data("a.txt", val_fraction=0.1, test_fraction=0.2), quiet))
    assert [len(*texts(corpus, name)) for name in ("train", "val", "test")] == [70, 10, 20]


def test_share_that_is_far_from_the_one_asked_for_is_said(tmp_path, text_data):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 90)
    events = []
    prepare(text_data("*.txt", val_fraction=0.05), events.append)
    _, note = [event["text"] for event in events if event["phase"] == "note"]  # the first: how files are read
    assert "val has 33.3% of the text, not the 5.0% of data.val_fraction" in note
    assert "there are 3" in note


def test_val_fraction_zero_holds_nothing_out(tmp_path, text_data):
    (tmp_path / "a.txt").write_text("some text")
    corpus = Corpus(prepare(text_data("a.txt", val_fraction=0.0), quiet))
    assert corpus.split("val").samples == 0
    assert texts(corpus, "train") == ["some text"]


def test_three_processes_write_the_same_bytes_as_one(tmp_path, text_data, monkeypatch):
    monkeypatch.setattr("train.data.prepare.first_pass._SPAN", 4000)
    write_lines(tmp_path / "a.jsonl", 300)
    one = prepare(text_data("a.jsonl", kind="bpe", vocab_size=300, shard_tokens=2000, dir="one"), quiet)
    many = prepare(text_data("a.jsonl", kind="bpe", vocab_size=300, shard_tokens=2000, dir="many", workers=3), quiet)
    assert content(one) == content(many)


@pytest.mark.parametrize(
    "name", ["train-000001.tar", "val-000000.tar", "train.table.npy", "tokenizer.json", "index.json"]
)
def test_damaged_file_is_made_again_and_the_rest_is_kept(tmp_path, text_data, name):
    write_lines(tmp_path / "a.jsonl", 300)
    data = text_data("a.jsonl", kind="bpe", vocab_size=300, shard_tokens=4000)
    folder = prepare(data, quiet)
    before = content(folder)
    kept = (folder / "train-000000.tar").stat().st_ino
    (folder / name).write_bytes((folder / name).read_bytes()[:-600])
    with pytest.raises(UserError, match=r"prepare` again"):
        find_prepared(data)
    assert prepare(data, quiet) == folder
    assert content(folder) == before
    assert (folder / "train-000000.tar").stat().st_ino == kept
    assert find_prepared(data) == folder


PREPARE = """
import sys
from train.config import schema
from train.config.keys.data import TokenizerConfig
from train.data.prepare.prepare import prepare
if __name__ == "__main__":
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=300)
    data = schema.DataConfig(
        source="text",
        paths=["a.jsonl"],
        tokenizer=tokenizer,
        shard_tokens=3000,
        workers=int(sys.argv[1]),
        dir=sys.argv[2],
    )
    prepare(data, lambda event: print(event, flush=True))
"""


def start(folder: Path, workers: int, name: str) -> subprocess.Popen:
    (folder / "go.py").write_text(PREPARE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "go.py", str(workers), name], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_after_sigkill_gives_the_same_bytes(tmp_path, text_data, workers):
    write_lines(tmp_path / "a.jsonl", 400)
    keys = {"kind": "bpe", "vocab_size": 300, "shard_tokens": 3000}
    undisturbed = content(prepare(text_data("a.jsonl", **keys, dir="once"), quiet))
    process = start(tmp_path, workers, "killed")
    for line in process.stdout:
        if "'tokenize'" in line and "'kept'" not in line:  # the first shard is written, others are on their way
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "index.json").exists()
    with pytest.raises(UserError, match="no prepared corpus"):
        Corpus(tmp_path / "killed")
    time.sleep(0.3)  # processes that lost their parent leave
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "killed").glob("*.tar")}
    receipts = {path.name.removesuffix(".json") for path in (tmp_path / "killed" / "receipts").glob("*.tar.json")}
    assert receipts
    events = []
    folder = prepare(text_data("a.jsonl", **keys, dir="killed", workers=workers), events.append)
    assert content(folder) == undisturbed
    assert not list(folder.glob(".aside-*"))
    assert next(event["kept"] for event in events if "kept" in event) == len(receipts)
    assert all((folder / name).stat().st_ino == finished[name] for name in receipts)


def test_two_prepares_at_once_make_one_corpus(tmp_path, text_data):
    write_lines(tmp_path / "a.jsonl", 400)
    both = [start(tmp_path, 1, "shared") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("'ready'" in output for output in outputs)
    expected = prepare(text_data("a.jsonl", kind="bpe", vocab_size=300, shard_tokens=3000, dir="alone"), quiet)
    assert content(tmp_path / "shared") == content(expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_exception_of_report_ends_the_work_and_keeps_finished_shards(tmp_path, text_data, workers):
    class StopPreparing(Exception):  # noqa: N818
        pass

    def stop(event):
        if event["phase"] == "tokenize" and event["done"]:
            raise StopPreparing

    write_lines(tmp_path / "a.jsonl", 300)
    data = text_data("a.jsonl", shard_tokens=3000, workers=workers)
    with pytest.raises(StopPreparing):
        prepare(data, stop)
    (folder,) = (tmp_path / "corpora").iterdir()
    assert not (folder / "index.json").exists()
    events = []
    prepare(data, events.append)
    assert next(event["kept"] for event in events if "kept" in event) >= 1


def test_text_that_changes_meanwhile_is_reported(tmp_path, text_data):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"one text or another, {name}")

    def change(event):
        if event["phase"] == "tokenizer":
            (tmp_path / "b.txt").write_text("one text or another, b.tx!")

    with pytest.raises(UserError, match=r"b.txt.*changed while it was being prepared"):
        prepare(text_data("a.txt", "b.txt"), change)


def test_folder_that_cannot_be_written_is_named(tmp_path, text_data):
    write_lines(tmp_path / "a.jsonl", 20)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be written.*file.*data.dir"):
        prepare(text_data("a.jsonl", dir="file/corpus"), quiet)
    with pytest.raises(UserError, match=r"cannot be written.*/proc"):
        prepare(text_data("a.jsonl", dir="/proc/corpus"), quiet)


def test_full_disk_is_named_and_finished_shards_are_kept(tmp_path, text_data):
    write_lines(tmp_path / "a.jsonl", 300)
    (tmp_path / "b.txt").write_text("a long document, " * 4000)
    data = text_data("a.jsonl", "b.txt", shard_tokens=3000, val_fraction=0.01, dir="small")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, old[1]))
        with pytest.raises(UserError, match=r"cannot be written: File too large.*data.dir.*kept"):
            prepare(data, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    receipts = list((tmp_path / "small" / "receipts").glob("*.tar.json"))
    assert receipts
    events = []
    prepare(data, events.append)
    assert next(event["kept"] for event in events if "kept" in event) == len(receipts)
    assert Corpus("small").split("train").samples + Corpus("small").split("val").samples == 301


def test_given_tokenizer_is_part_of_the_corpus(tmp_path, text_data):
    write_lines(tmp_path / "a.jsonl", 60)
    made = prepare(text_data("a.jsonl", kind="bpe", vocab_size=300), quiet)
    given = text_data("a.jsonl", kind="file", tokenizer_path=str(made / "tokenizer.json"))
    folder = prepare(given, quiet)
    assert Corpus(folder).tokenizer.fingerprint == Corpus(made).tokenizer.fingerprint
    assert find_prepared(given) == folder
    with pytest.raises(UserError, match=r"no\.json"):
        prepare(text_data("a.jsonl", kind="file", tokenizer_path="no.json"), quiet)


def unigram_file(folder: Path) -> Path:
    """A tokenizer of English letters, which has a token for all that it does not know."""
    fast = Fast(
        models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in "abcdefghijklmnopqrstuvwxyz ")], unk_id=0)
    )
    fast.add_special_tokens(["</s>"])
    fast.save(str(folder / "english.json"))
    return folder / "english.json"


def test_text_unknown_to_a_given_tokenizer_is_said_and_much_refused(tmp_path, text_data):
    given, notes = {"kind": "file", "tokenizer_path": str(unigram_file(tmp_path))}, []

    def report(event):
        notes.extend([event["text"]] if "unknown" in event.get("text", "") else [])

    (tmp_path / "zh.txt").write_text("床前明月光，疑是地上霜。" * 50)
    with pytest.raises(UserError, match=r"(?s)9\d\.\d\d% of the text is unknown.*data\.tokenizer\.max_unknown=1 "):
        prepare(text_data(tmp_path / "zh.txt", **given), report)
    assert notes == []
    allowed = prepare(text_data(tmp_path / "zh.txt", **given, max_unknown=1.0), report)
    assert "is unknown to the tokenizer" in notes.pop()
    (tmp_path / "en.txt").write_text("a short text of words " * 50 + "é")
    prepare(text_data(tmp_path / "en.txt", **given), report)
    assert notes[0].startswith("0.09% of the text is unknown")
    assert "max_unknown" not in json.dumps(Corpus(allowed).index["settings"])


def test_check_of_the_tokenizer_comes_before_anything_is_written(tmp_path, text_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zh.txt").write_text("床前明月光")

    def refuse(known):
        known.encode("光")
        known.encode("def ")
        raise UserError("too long")

    for kind, words in (("chars", "characters"), ("bytes", "too long")):
        with pytest.raises(UserError, match=words):
            prepare(text_data(tmp_path / "zh.txt", kind=kind), quiet, check=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["zh.txt"]
