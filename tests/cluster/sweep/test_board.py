"""The table of a sweep is readable on a narrow terminal and in a file: no number is cut."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gloo_ranks

from cluster.sweep.board import Board
from cluster.sweep.trial import Trial
from train.reporting.terminal import UserConsole

PARAMS = {"model.width": "96", "model.layers": "3", "model.mlp_width": "256", "optimizer.lr": "0.0033", "steps": "4398"}


def board(terminal: UserConsole | None) -> Board:
    done = Trial(0, PARAMS, gloo_ranks.compose("steps=4398"), "done", 4398, values=[1.4924])
    failed = Trial(
        11, PARAMS | {"optimizer.lr": "0.0046"}, gloo_ranks.compose("steps=4398"), "failed", 784, values=[2.2065]
    )
    made = Board(terminal)
    made.metrics, made.trials, made.best = ("val_loss",), lambda: [done, failed], lambda: [done]
    return made


def contains(line: str, cells: list[str]) -> bool:
    return all(cell in line for cell in cells)


def check_rows(said: str) -> None:
    for row in (
        ["0", "96", "3", "256", "0.0033", "4,398/4,398", "done", "1.4924 *"],
        ["0.0046", "784/4,398", "failed", "2.2065"],
    ):
        assert any(contains(line, row) for line in said.splitlines()), said


@pytest.mark.parametrize("width", [80, 200])
def test_table_on_a_narrow_terminal_keeps_numbers_whole(width: int):
    out = io.StringIO()
    board(UserConsole(file=out, width=width, force_terminal=True, color_system=None)).print_table()
    check_rows(out.getvalue())


def test_table_in_a_file_is_not_cut():
    command = [sys.executable, "-c", "import test_board; test_board.board(None).print_table()"]
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parent}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    check_rows(done.stdout)
    assert "optimizer.lr" in done.stdout


def test_table_tells_keys_with_the_same_last_part_apart():
    params = {"model.name": "a", "optimizer.name": "b"}
    trial = Trial(0, params, gloo_ranks.compose(), "done", 8, values=[1.0])
    out = io.StringIO()
    shown = board(UserConsole(file=out, width=120, force_terminal=True, color_system=None))
    shown.trials, shown.best = lambda: [trial], lambda: [trial]
    shown.print_table()
    assert "model.name" in out.getvalue()
    assert "optimizer.name" in out.getvalue()
