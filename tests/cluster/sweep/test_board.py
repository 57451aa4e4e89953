"""The table of a sweep can be read: every number whole, on a narrow terminal and in a file."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from helpers import gloo_ranks
from rich.console import Console

from cluster.sweep.board import Board
from cluster.sweep.trial import Trial

PARAMS = {"model.width": "96", "model.layers": "3", "model.mlp_width": "256", "optimizer.lr": "0.0033", "steps": "4398"}


def board(terminal: Console | None) -> Board:
    done = Trial(0, PARAMS, gloo_ranks.compose("steps=4398"), "done", 4398, values=[1.4924])
    failed = Trial(
        11, PARAMS | {"optimizer.lr": "0.0046"}, gloo_ranks.compose("steps=4398"), "failed", 784, values=[2.2065]
    )
    found = Board(terminal)
    found.metrics, found.trials, found.best = ("val_loss",), lambda: [done, failed], lambda: [done]
    return found


def readable(said: str) -> None:
    for row in (
        ["0", "96", "3", "256", "0.0033", "4,398/4,398", "done", "1.4924 *"],
        ["0.0046", "784/4,398", "failed", "2.2065"],
    ):
        assert any(all(cell in line for cell in row) for line in said.splitlines()), said


@pytest.mark.parametrize("width", [80, 200])
def test_numbers_stay_whole_on_a_terminal(width: int):
    out = io.StringIO()
    board(Console(file=out, width=width, force_terminal=True, color_system=None)).final()
    readable(out.getvalue())


def test_a_file_is_as_wide_as_the_table():
    command = [sys.executable, "-c", "import test_board; test_board.board(None).final()"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=__file__.rpartition("/")[0])
    readable(told.stdout)
    assert "optimizer.lr" in told.stdout


def test_keys_of_one_last_name_are_told_apart():
    params = {"model.name": "a", "optimizer.name": "b"}
    trial = Trial(0, params, gloo_ranks.compose(), "done", 8, values=[1.0])
    out = io.StringIO()
    found = board(Console(file=out, width=120, force_terminal=True, color_system=None))
    found.trials, found.best = lambda: [trial], lambda: [trial]
    found.final()
    assert "model.name" in out.getvalue()
    assert "optimizer.name" in out.getvalue()
