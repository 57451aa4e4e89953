"""The verbs of ``python -m train``, as a person gives them, on a small trained run."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gloo_ranks

from train.__main__ import main
from train.cli import generate
from train.config import schema
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import held_out_text
from train.data.prepare.prepare import prepare
from train.errors import ExitCode, UserError
from train.util.run_layout import RunDir

BERT = ("model=bert_tiny", "objective=masked", "steps=1", "cluster.workers=1")
SAMPLE = ("generation.prompts=[ab]", "generation.max_tokens=12")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("trained")
    config = gloo_ranks.on_corpus(
        corpus, folder / "run", "steps=6", "save_every=2", "zero=3", "cluster.workers=2", *SAMPLE
    )
    gloo_ranks.train_world(config, corpus)
    return config


def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(gloo_ranks.REPOSITORY), "COLUMNS": "150"}
    command = [sys.executable, "-m", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_evaluate_prints_the_loss_of_the_run_and_gzip_on_the_same_bytes(trained: Config, corpus: Path):
    done = verb("evaluate", f"run.dir={trained.run.dir}")
    assert done.returncode == 0, done.stderr
    loss = gloo_ranks.metrics(trained)[-1]["val_loss"]
    assert f"{loss:.4f}" in done.stdout
    text = b"".join(held_out_text(Corpus(corpus)))
    assert f"{8 * len(gzip.compress(text, 9)) / len(text):.4f}" in done.stdout
    assert re.search(r"bits_per_byte .* \d\.\d{4}", done.stdout)


def test_evaluate_of_the_test_split_reads_text_that_no_step_has_read(corpus: Path, tmp_path: Path, capsys):
    keys = [
        f"data.paths=[{corpus.parent / 'text'}]",
        "data.test_fraction=0.3",
        f"data.dir={tmp_path}/corpus",
        "data.workers=1",
    ]
    config = gloo_ranks.compose(
        *gloo_ranks.TINY, *gloo_ranks.TEXT, *keys, f"run.dir={tmp_path}/run", "steps=2", "eval_every=0"
    )
    splits = Corpus(prepare(config.data, lambda event: None)).index["splits"]
    gloo_ranks.train_world(config, tmp_path / "corpus")
    found = {}
    for split in ("val", "test"):
        assert main(["evaluate", f"run.dir={tmp_path}/run", f"split={split}", "--json"]) == 0
        found[split] = json.loads(capsys.readouterr().out)
        assert found[split]["places"] == splits[split]["tokens"]
    assert found["val"]["val_loss"] == pytest.approx(gloo_ranks.metrics(config)[-1]["val_loss"])
    assert found["test"]["val_loss"] != found["val"]["val_loss"]
    assert main(["evaluate", f"run.dir={tmp_path}/run", "split=test"]) == 0
    assert f"{splits['test']['tokens']:,} held-out places, test" in capsys.readouterr().out


def test_evaluate_without_anything_to_predict_is_refused(corpus: Path, tmp_path: Path, capsys):
    config = gloo_ranks.on_corpus(corpus, tmp_path / "run", *BERT)
    gloo_ranks.train_world(config, corpus)
    file = RunDir(tmp_path / "run").config
    file.write_text(re.sub(r"(?m)^  rate: .*$", "  rate: 0.0", file.read_text()))
    assert main(["evaluate", f"run.dir={tmp_path}/run"]) == 2
    assert "no token is to be predicted in what is held out of this corpus as val" in capsys.readouterr().err


def test_generate_with_the_same_seed_gives_the_same_text(trained: Config):
    texts = [verb("generate", f"run.dir={trained.run.dir}", "prompt=ab =", "max_tokens=12", "seed=3") for _ in range(2)]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith("ab =")
    assert texts[0].stdout == texts[1].stdout


def test_generate_equals_the_samples_that_a_sharded_run_wrote(trained: Config, capsys: pytest.CaptureFixture[str]):
    samples = [json.loads(line) for line in (Path(trained.run.dir or "") / "samples.jsonl").read_text().splitlines()]
    assert main(["generate", f"run.dir={trained.run.dir}", "prompt=ab"]) == 0
    assert capsys.readouterr().out == "ab" + samples[-1]["text"] + "\n"


def test_generate_reads_prompts_from_a_file_and_standard_input(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "prompts.txt").write_bytes("\ufeffab\r\n\r\nnö\r\n".encode())
    common = ["generate", f"run.dir={trained.run.dir}", "generation=beam", "beams=3", "n=2", "max_tokens=6", "batch=1"]
    assert main([*common, f"prompts={tmp_path}/prompts.txt", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["ab", "ab", "nö", "nö"]
    assert lines[0]["score"] >= lines[1]["score"]
    assert {"text", "reason"} <= lines[0].keys()
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nnö\n"))
    assert main([*common, "prompts=-"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("--- ")][
        2
    ] == f"--- prompt 2 of 2, score {lines[2]['score']:.4f}"
    assert f"ab{lines[0]['text']}" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nnö"))
    assert main(["generate", f"run.dir={trained.run.dir}", "prompt=-", "max_tokens=0"]) == 0
    assert capsys.readouterr().out == "ab\nnö\n"


def test_prompts_begin_after_a_mark_and_end_at_line_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "\ufeffone\u2028still\x0cone\r\n  \ntwo"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert (
        generate.read_prompts("", f"{tmp_path}/prompts.txt")
        == generate.read_prompts("", "-")
        == ["one\u2028still\x0cone", "two"]
    )
    (tmp_path / "prompts.txt").write_bytes("prompt".encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8"):
        generate.read_prompts("", f"{tmp_path}/prompts.txt")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input, which is closed"):
        generate.read_prompts("-", "")


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in schema.GenerationConfig.model_fields if name != "prompts")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate"], "run.dir=... is needed"),
        (["evaluate", "run.dir=/nowhere"], "holds no run"),
        (["evaluate", "run.dir=RUN", "split=dev"], "split=dev: there is val"),
        (["evaluate", "run.dir=RUN", "split=test"], "has no split 'test': it has train, val (data.test_fraction)"),
        (["generate", "run.dir=RUN", "checkpoint=3"], "It has the steps 2, 4, 6"),
        (["generate", "run.dir=RUN", "temperature=hot"], "temperature"),
        (["generate", "run.dir=RUN", "promt=x"], "prompt"),
        (
            ["generate", "run.dir=RUN", "prompt=" + 40 * "x"],
            "prompt 0 has 41 tokens, and the model's longest sequence is 32: shorten it",
        ),
        (["generate", "run.dir=RUN", "prompt=x", "prompts=y"], "give one of them"),
        (["generate", "run.dir=RUN", "prompts=/nowhere"], "No such file"),
        (["generate", "run.dir=RUN", "generation=beem"], "did you mean 'beam'"),
        (["generate", "run.dir=RUN", "beams=2", "n=3"], "raise beams, or lower n"),
        (["generate", "run.dir=RUN", "stop=[1]"], "stop"),
        (["generate", "run.dir=RUN", "length_penalty=2"], "generation.length_penalty has no effect with"),
        (["sing"], "usage"),
    ],
)
def test_bad_arguments_exit_with_code_2(
    trained: Config, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main([a.replace("RUN", str(trained.run.dir)) for a in arguments]) == 2
    assert said in capsys.readouterr().err


LONG, FOREIGN = "n" * 300, b"a\xff".decode("utf-8", "surrogateescape")


@pytest.fixture
def bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the file ``b.txt``, and ``loop``, a link to itself."""
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("text\n")
    Path("loop").symlink_to("loop")


@pytest.mark.usefixtures("bad_paths")
@pytest.mark.parametrize("folder", ["b.txt", "b.txt/x", "loop", LONG, FOREIGN, "/proc/x", "a\0b"])
@pytest.mark.parametrize("words", ["evaluate", "generate prompt=x", "trace step=1", "export to=out"])
def test_a_path_that_is_no_run_is_refused_with_its_name(folder: str, words: str, capsys):
    verb, *rest = words.split()
    assert main([verb, f"run.dir={folder}", *rest]) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"{verb}: ")
    assert folder[:5] in error or "a\\x" in error
    assert not Path("out").exists()


@pytest.mark.usefixtures("bad_paths")
@pytest.mark.parametrize("to", ["b.txt/x", "/proc/x", LONG, "loop", FOREIGN])
def test_export_to_a_place_that_takes_nothing_is_refused(trained: Config, to: str, capsys):
    before = sorted(Path().iterdir())
    assert main(["export", f"run.dir={trained.run.dir}", f"to={to}"]) == ExitCode.BAD_INPUT
    assert re.match(r"export: .*(b\.txt|/proc|nnnn|loop|a\\xff).*", capsys.readouterr().err)
    assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("bad_paths")
@pytest.mark.parametrize("given", ["data.dir=loop", f"data.dir={LONG}", "data.dir=b.txt/x", f"data.paths=[{FOREIGN}]"])
def test_prepare_into_a_place_that_takes_nothing_is_refused(given: str, capsys):
    keys = ["data=text", "data.paths=[b.txt]", "data.tokenizer.kind=bytes", "data.workers=1", given]
    assert main(["prepare", *keys]) == ExitCode.BAD_INPUT
    assert re.match(r"prepare: .*(b\.txt|nnnn|loop|a\\xff).*", capsys.readouterr().err)


@pytest.mark.usefixtures("bad_paths")
def test_a_prompt_that_is_not_utf_8_is_refused(capsys):
    assert main(["generate", "run.dir=b.txt", f"prompt={FOREIGN}"]) == ExitCode.BAD_INPUT
    assert "the argument 'prompt=a\\xff' is not UTF-8 text" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert generate.read_prompts("", str(tmp_path / "p.txt")) == ["one", "two"]


def test_prompt_from_closed_standard_input_is_refused(trained: Config):
    words = [sys.executable, "-m", "train", "generate", f"run.dir={trained.run.dir}", "prompt=-"]
    environment = {**os.environ, "PYTHONPATH": str(gloo_ranks.REPOSITORY)}
    command = ["bash", "-c", 'exec "$@" <&-', "bash", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 2
    assert "reads the prompt from standard input, which is closed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\\x1b[2J\n"), (False, "a\x1b[2J\n")])
def test_generated_escape_sequences_reach_files_but_no_terminal(terminal, shown, monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    generate._write("a\x1b[2J\n")
    assert out.getvalue() == shown
