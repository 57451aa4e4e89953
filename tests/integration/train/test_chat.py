"""Training on conversations: the same gradient and losses for any accumulation, packing and world, and after a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import gloo_ranks

from train.batch import IGNORE, count_targets
from train.config import load as configuration
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.prepare.prepare import prepare
from train.data.sampling.batch_plan import Cursor
from train.errors import UserError

KEYS = ("data=chat", "data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=null", "data.workers=1")
SIZES = ("batch.seq_len=96", "model.max_len=96", "data.shard_tokens=4000", "data.val_fraction=0.2")
PROVEN = ("verify.gradient=first_step", "steps=2", "eval_every=0", "save_every=0", "model.dropout=0.1")


def row(number: int) -> dict[str, Any]:
    """A conversation of one of five kinds, of one to three turns."""
    draw = random.Random(number)
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    turns = [("user", f"{a}+{b}?"), ("assistant", str(a + b))] * draw.randint(1, 3)
    return [
        {"messages": [{"role": "system", "content": "Add."}, *({"role": r, "content": c} for r, c in turns)]},
        {"prompt": f"What is {a} plus {b}?", "completion": f"It is {a + b}."},
        {"conversations": [{"from": {"user": "human"}.get(r, "gpt"), "value": c} for r, c in turns]},
        {"instruction": f"Say {a}.", "input": "", "output": str(a)},
        {"prompt": f"{a} or {b}?", "chosen": str(max(a, b)), "rejected": "No."},
    ][number % 5]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(200)))
    return file


@pytest.fixture
def chat(rows: Path, tmp_path: Path):
    """chat(*overrides, name=) -> a run on conversations, in a folder of its own."""

    def composed(*overrides: str, name: str = "run") -> Config:
        here = f"data.paths=[{rows}]", f"data.dir={rows.with_name('corpus')}", f"run.dir={tmp_path / name}"
        return gloo_ranks.compose(*KEYS, *SIZES, *here, *overrides)

    return composed


def prepared(config: Config, notes: list[str] | None = None) -> Path:
    return prepare(config.data, lambda event: notes.append(event.get("text", "")) if notes is not None else None)


def test_rows_hold_what_the_assistant_says_and_its_end_of_turn(chat):
    config = chat()
    corpus = Corpus(prepared(config))
    end = corpus.tokenizer.id_of("<|im_end|>")
    loader = training_loader(corpus, config, RankShare(0, 1, 4))
    conversations, cursor = set(), Cursor()
    for _ in range(loader.plan.steps_left(Cursor())):
        [batch] = loader.peek(cursor)
        cursor = loader.plan.after(cursor)
        for tokens, targets, segments, positions in zip(
            *(batch[key] for key in ("tokens", "targets", "segments", "positions")), strict=True
        ):
            for segment in range(1, int(segments.max()) + 1):
                inside = segments == segment
                assert positions[inside].tolist() == list(range(int(inside.sum())))
                trained = targets[inside]
                assert trained[-1] == end  # nothing behind the last answer is kept
                answers = "".join(
                    corpus.tokenizer.decode(list(ids))
                    for known, ids in itertools.groupby(trained.tolist(), lambda target: target != IGNORE)
                    if known
                )
                conversations.add((corpus.tokenizer.decode(tokens[inside].tolist()), answers))
            assert (targets[segments == 0] == IGNORE).all()
    for text, answers in conversations:
        asked = [part.split("<|im_end|>")[0] for part in f"{text}<|im_end|>".split("<|im_start|>assistant\n")[1:]]
        assert answers == "".join(f"{part}<|im_end|>" for part in asked)
    assert len(conversations) > 100


@pytest.mark.parametrize(
    ("stage", "workers", "micro", "pack"),
    [(0, 1, 8, True), (1, 2, 2, True), (2, 2, 4, False), (3, 2, 1, True), (3, 1, 2, False)],
)
def test_gradient_of_conversations_is_that_of_plain_autograd(chat, rows: Path, stage, workers, micro, pack, tmp_path):
    folder = tmp_path / "corpus"
    keys = f"zero={stage}", f"cluster.workers={workers}", f"batch.micro={micro}", f"data.pack={str(pack).lower()}"
    config = chat(*PROVEN, *keys, "batch.global=8", f"data.dir={folder}")
    assert set(gloo_ranks.train_world(config, prepared(config))) == {"done"}
    report = json.loads((Path(config.run.dir or "") / "gradient.json").read_text())
    assert report["equal"]
    assert report["largest"] < 1e-5


def test_losses_and_data_are_the_same_for_any_accumulation_and_world(chat):
    lines = []
    for number, keys in enumerate(
        [("batch.micro=4", "cluster.workers=1"), ("batch.micro=1", "cluster.workers=2", "zero=3")]
    ):
        config = chat("steps=4", *keys, name=f"run{number}")
        assert set(gloo_ranks.train_world(config, prepared(config))) == {"done"}
        lines.append(gloo_ranks.metrics(config))
        assert not any("bits_per_byte" in line for line in lines[-1])
    for first, second in zip(*lines, strict=True):
        assert (first["data_hash"], first["tokens"]) == (second["data_hash"], second["tokens"])
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def die(context: Any, emit: Any, config: dict[str, Any], corpus: str) -> None:
    """Train until a checkpoint is known to be complete, and be killed at that moment."""

    def watch(event: dict[str, Any]) -> None:
        emit(event)
        if event["event"] == "save":
            os.kill(os.getpid(), signal.SIGKILL)

    gloo_ranks.train(context, watch, config, corpus)


def test_killed_run_on_conversations_resumes_bit_for_bit(chat):
    whole, parts = chat("zero=2", name="whole"), chat("zero=2", name="parts")
    corpus = prepared(whole)
    gloo_ranks.train_world(whole, corpus)
    killed = gloo_ranks.start(2, die, configuration.to_dict(parts), str(corpus)).wait()
    assert -signal.SIGKILL in [rank.code for rank in killed]
    gloo_ranks.train_world(parts, corpus)
    assert gloo_ranks.metrics(parts) == gloo_ranks.metrics(whole)
    expected, found = gloo_ranks.state(whole, 8), gloo_ranks.state(parts, 8)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_prepare_says_what_was_cut_and_how_much_is_trained(chat, tmp_path: Path):
    notes: list[str] = []
    prepared(chat(f"data.dir={tmp_path / 'short'}", "data.row_tokens=80"), notes)
    [text] = [note for note in notes if "conversations in" in note]
    assert "of their tokens are trained" in text
    assert "turns were cut from" in text


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"text": "a"}', "is no conversation (its fields are ['text'])"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "the unknown role 'boss'"),
        ('{"prompt": "a", "completion": ', "is not JSON"),
    ],
    ids=["kind", "role", "cut"],
)
def test_row_that_is_no_conversation_is_named_by_file_and_line(chat, rows: Path, tmp_path: Path, bad: str, words: str):
    file = tmp_path / "more.jsonl"
    file.write_text(rows.read_text() + bad + "\n")
    config = chat(f"data.paths=[{file}]", f"data.dir={tmp_path / 'corpus'}")
    with pytest.raises(UserError) as error:
        prepared(config)
    assert words in str(error.value)
    assert f"{file}: line 201 " in str(error.value)
    prepared(chat(f"data.paths=[{file}]", f"data.dir={tmp_path / 'corpus'}", "data.bad_rows=skip"))


def test_first_turn_that_is_longer_than_a_row_is_refused_by_file_and_line(chat, tmp_path: Path):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "a" * 200, "completion": "b"}) + "\n" + json.dumps(row(1)) + "\n")
    with pytest.raises(UserError, match=r"long\.jsonl: line 1 .*cannot be used: it has 2\d\d tokens"):
        prepared(chat(f"data.paths=[{file}]", f"data.dir={tmp_path / 'corpus'}", "data.val_fraction=0"))


def test_template_that_trains_everything_is_refused(chat, tmp_path: Path):
    template = tmp_path / "all.jinja"
    marked = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    template.write_text("{% for m in messages %}{% if m.role == 'assistant' %}" + marked + "{% endif %}{% endfor %}")
    with pytest.raises(UserError, match="100% of the tokens would be trained"):
        prepared(chat(f"data.template={template}", f"data.dir={tmp_path / 'corpus'}"))


def test_other_template_makes_another_corpus(chat, tmp_path: Path):
    config = chat(f"data.dir={tmp_path / 'corpus'}")
    prepared(config)
    with pytest.raises(UserError, match=r"data\.template"):
        prepared(chat(f"data.dir={tmp_path / 'corpus'}", "data.template=llama3"))


def test_count_of_targets_is_that_of_trained_tokens(chat):
    config = chat()
    corpus = Corpus(prepared(config))
    batch = training_loader(corpus, config, RankShare(0, 1, 4)).peek(Cursor())[0]
    assert count_targets(batch) == {"loss": int((batch["targets"] != IGNORE).sum())}


def test_conversations_of_a_parquet_file_are_read_and_named_by_row(chat, tmp_path: Path):
    file = tmp_path / "rows.parquet"
    good = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(9)
    ]
    bad = {"messages": [{"role": "boss", "content": "a"}, {"role": "assistant", "content": "b"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*good, bad]), file)
    keys = f"data.paths=[{file}]", f"data.dir={tmp_path / 'corpus'}", "data.val_fraction=0"
    with pytest.raises(
        UserError, match=r"rows\.parquet: row 10 has message 1 of 'messages' of the unknown role 'boss'"
    ):
        prepared(chat(*keys))
    notes: list[str] = []
    prepared(chat(*keys, "data.bad_rows=skip"), notes)
    assert any(note.startswith("9 conversations in") for note in notes)
