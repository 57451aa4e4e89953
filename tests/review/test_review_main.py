"""The command ``review`` on paths that hold no run, and into places that take nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.run_dirs import write_run

from review.__main__ import main
from train.errors import ExitCode


@pytest.mark.parametrize("out", ["b.txt", "b.txt/x", "/proc/x", "n" * 300, "loop"])
@pytest.mark.parametrize("only", ["html", "png"])
def test_review_into_a_place_that_takes_nothing_is_refused(
    out: str, only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("")
    Path("loop").symlink_to("loop")
    write_run(tmp_path / "run")
    assert main(["run", "--out", out, "--format", only]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith(f"review: {out}")


@pytest.mark.parametrize("run", ["loop", "n" * 300, b"a\xff".decode("utf-8", "surrogateescape"), "b.txt/x"])
def test_review_of_a_path_that_holds_no_run_is_refused(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("")
    Path("loop").symlink_to("loop")
    assert main([run, "--format", "md"]) == ExitCode.BAD_INPUT
    assert run[:1] in capsys.readouterr().err
