"""A sweep's ledger after a crash, and the sweeps that it refuses."""

from __future__ import annotations

import pytest

from cluster.sweep.ledger import SweepLedger
from train.config import load as configuration
from train.config import sweep_space
from train.errors import UserError

TWO = ["optimizer.lr=1e-3,1e-2", "model=gpt_tiny,llama_tiny"]


def open_ledger(folder, words):
    sweep = configuration.load_sweep([*words, f"sweep.dir={folder}", "sweep.name=s"])
    return SweepLedger(folder, sweep, sweep_space.grid(sweep))


def choices(ledger):
    return [trial.params for trial in ledger.trials.values()]


def test_ledger_with_a_torn_last_line_keeps_all_others(tmp_path):
    ledger = open_ledger(tmp_path, TWO)
    ledger.record_start(0, 2, ["here", "here"])
    ledger.record_end(0, {"state": "done", "step": 8, "values": [2.5], "why": ""})
    ledger.record_start(1, 2, ["here", "here"])
    with ledger.file.open("a") as file:
        file.write('{"event": "end", "trial": 1, "sta')
    again = open_ledger(tmp_path, TWO)
    assert [(t.state, t.values) for t in again.trials.values()] == [
        ("done", [2.5]),
        ("cut off", None),
        ("queued", None),
        ("queued", None),
    ]
    again.record_end(1, {"state": "failed", "step": 3, "values": None, "why": "it broke"})
    assert open_ledger(tmp_path, TWO).trials[1].why == "it broke"
    assert [t.params for t in again.trials.values()][1] == {"optimizer.lr": "0.001", "model": "llama_tiny"}


def test_ledger_of_another_sweep_is_refused_naming_each_difference(tmp_path):
    open_ledger(tmp_path, [*TWO, "steps=8"]).record_start(0, 2, [])
    open_ledger(tmp_path, [*TWO, "steps=8", "cluster.workers=1", "sweep.retries=3"])
    with pytest.raises(UserError) as caught:
        open_ledger(tmp_path, ["optimizer.lr=1e-3,1e-1", "model=gpt_tiny,llama_tiny", "steps=9", "seed=3"])
    for words in (
        "optimizer.lr: 1e-3,1e-2 there, 1e-3,1e-1 here",
        "steps: 8 there, 9 here",
        "seed: nothing there, 3 here",
        "sweep.name",
    ):
        assert words in str(caught.value)


def test_shuffled_grid_keeps_its_first_order_after_a_restart(tmp_path):
    words = ["seed=shuffle(range(50))"]
    first = open_ledger(tmp_path, words)
    first.record_start(0, 1, [])
    assert choices(open_ledger(tmp_path, words)) == choices(first)
