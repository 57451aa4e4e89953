"""The verbs of conversations: a small model that has learned three answers is talked to, and rows are looked at."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import gloo_ranks

from train.__main__ import main
from train.cli.chat import Chat
from train.config.schema import Config, GenerationConfig
from train.data.chat.template import ChatTemplate, TemplateSource
from train.data.prepare.prepare import prepare
from train.errors import ExitCode, UserError
from train.evaluate import Evaluation
from train.run_dir.open_run import open_run
from train.util.run_layout import RunDir

ANSWERS = {"hi": "yo", "sun": "day", "moon": "night"}
KEYS = (
    *("data=chat", "data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=null", "data.workers=1"),
    *("data.dedup=false", "data.val_fraction=0", "batch.seq_len=96", "model.max_len=96", "data.template=qwen"),
    *("steps=60", "eval_every=0", "save_every=0", "cluster.workers=1", "generation.temperature=0"),
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has learned ANSWERS, and that the second turn is answered by the first answer again."""
    folder = tmp_path_factory.mktemp("learned")
    rows = [json.dumps({"prompt": asked, "completion": said}) for asked, said in ANSWERS.items()]
    (folder / "rows.jsonl").write_text("\n".join(rows * 20))
    here = f"data.paths=[{folder}/rows.jsonl]", f"data.dir={folder}/corpus", f"run.dir={folder}/run"
    config = gloo_ranks.compose(*KEYS, *here)
    assert gloo_ranks.train_world(config, prepare(config.data, lambda event: None)) == ["done"]
    return config


@pytest.fixture
def chat(learned: Config) -> Chat:
    saved = open_run(Path(learned.run.dir or ""))
    source = TemplateSource.read(RunDir(Path(learned.run.dir or "")).chat_template)
    return Chat(saved.objective, ChatTemplate(source, saved.tokenizer), GenerationConfig(temperature=0))


def test_model_answers_as_it_was_taught_piece_by_piece(chat: Chat):
    for asked, said in ANSWERS.items():
        pieces: list[str] = []
        chat.reset()
        assert chat.answer(asked, pieces.append) == said
        assert "".join(pieces) == said
        assert len([piece for piece in pieces if piece]) > 1
    assert [message["content"] for message in chat.messages] == ["moon", "night"]


def test_history_is_read_until_reset_and_what_is_too_long_is_refused(chat: Chat):
    chat.answer("hi")
    prompt = chat.template.encode_prompt([*chat.messages, {"role": "user", "content": "sun", "train": False}])
    assert chat.template.tokenizer.decode(prompt).count("<|im_start|>") == 4
    with pytest.raises(UserError, match="longest sequence is 96"):
        chat.answer("a" * 100)
    assert len(chat.messages) == 2  # the question is dropped
    chat.reset()
    assert chat.answer("sun") == "day"


def test_verb_answers_lines_of_its_input(learned: Config, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\nmoon\n/quit\nsun\n"))
    assert main(["chat", f"run.dir={learned.run.dir}", "temperature=0"]) == ExitCode.OK
    assert capsys.readouterr().out == "yo\nnight\n"


def test_chat_with_a_run_on_text_names_the_verb_for_it(corpus: Path, tmp_path: Path, capsys):
    config = gloo_ranks.on_corpus(corpus, tmp_path / "run", "steps=1", "cluster.workers=1")
    gloo_ranks.train_world(config, corpus)
    assert main(["chat", f"run.dir={config.run.dir}"]) == ExitCode.BAD_INPUT
    assert "generate continues its texts" in capsys.readouterr().err


def test_look_shows_targets_apart_on_a_terminal_and_as_a_page(learned: Config, tmp_path: Path, capsys):
    command = [
        f"data.paths={learned.data.paths}".replace("'", ""),
        f"data.dir={learned.data.dir}",
        "model=gpt_tiny",
        *KEYS,
    ]
    assert main(["look", *command, "rows=1"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert re.search(r"row 0: \d documents?, \d+ of 96 tokens, \d+ targets", shown)
    assert "| <|im_start|>user\n" in shown
    page = tmp_path / "rows.html"
    assert main(["look", *command, "rows=2", f"html={page}"]) == ExitCode.OK
    trained = "".join(re.findall(r"<b>(.*?)</b>", page.read_text().partition("</h1>")[2].partition("</div>")[2]))
    answers = set(trained.split("&lt;|im_end|&gt;")) - {""}
    assert answers
    assert answers <= set(ANSWERS.values())


def test_look_refuses_objectives_that_have_no_next_token(corpus: Path, capsys):
    text = corpus.parent / "text"
    command = [f"data.paths=[{text}]", f"data.dir={corpus}", *gloo_ranks.TEXT, "model=bert_tiny", "objective=masked"]
    assert main(["look", *command]) == ExitCode.BAD_INPUT
    assert "objective=masked" in capsys.readouterr().err


def test_loss_of_answers_alone_is_not_given_per_byte_of_text():
    sums = {"loss": (np.array(8.0), 4)}
    assert Evaluation(sums, 0.0).numbers() == {"val_loss": 2.0}
    assert "bits_per_byte" in Evaluation(sums, 16.0).numbers()
