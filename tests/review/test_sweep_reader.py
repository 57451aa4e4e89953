"""Sweeps in a review: states from the ledger, comparison by their keys and metric, and the page in a browser."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from helpers import run_dirs
from helpers.chromium import NO_BROWSER, Browser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.host import run_lock
from review import __main__ as command
from review import markdown
from review.colors import NEUTRAL, line_styles, score_range
from review.html import page, parallel_axes
from review.importance import key_importances
from review.run_differences import best_runs, differing_keys, ranked_runs, verdict
from review.run_reader import RunRecord, read_runs
from review.search_history import search_history

SPACES = {
    "optimizer": "adamw,momentum",
    "optimizer.lr": "tag(log,interval(1e-4,1e-2))",
    "model.dropout": "interval(0,0.5)",
}
ENDS = (*["done"] * 20, *["pruned"] * 14, *["diverged"] * 3, "failed", "failed", "cut off")
WHY = {
    "diverged": "10 updates in a row had a gradient that is not finite",
    "failed": "model.heads=3 does not divide 64",
}


def params(i: int) -> dict:
    at = (i * 0.618) % 1
    return {
        "optimizer": ("adamw", "momentum")[i % 2],
        "optimizer.lr": 10 ** (2 * at - 4),
        "model.dropout": (i * 7 % 40) / 80,
    }


def trial(i: int, state: str) -> dict:
    own = params(i)
    loss = 3 + abs(math.log10(own["optimizer.lr"] / 1e-3))
    return {
        "state": state,
        "params": own,
        "loss": loss,
        "values": [loss],
        "why": WHY.get(state, ""),
        "gone": state == "failed",
    }


def write_forty_trials(folder: Path) -> Path:
    """Writes a search of 40 trials that ended in every possible state."""
    order = sorted(range(40), key=lambda i: i * 17 % 40)
    return run_dirs.write_sweep(folder, [trial(i, ENDS[end]) for i, end in enumerate(order)], spaces=SPACES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunRecord], Path]:
    """The runs of a search of 40 trials, and the folder of its review."""
    folder = tmp_path_factory.mktemp("sweep")
    runs = read_runs([write_forty_trials(folder / "lr")])
    assert command.main([str(folder / "lr"), "--out", str(folder / "out")]) == 0
    return runs, folder / "out"


def test_trial_states_and_reasons_are_those_of_the_ledger(made):
    runs, _ = made
    assert sorted(run.state for run in runs) == sorted(ENDS)
    whys = {run.state: run.end_reason for run in runs}
    assert whys["done"] == ""
    assert "asha pruner at step 100 with val_loss" in whys["pruned"]
    assert whys["failed"] == WHY["failed"]
    assert "same command goes on" in whys["cut off"]
    assert next(run.name for run in runs if run.state == "failed").startswith("lr-0"), (
        "one that never had a folder is named too"
    )
    [told] = {run.sweep.status_text() for run in runs if run.sweep}
    assert "40 trials: 20 done, 14 pruned, 3 diverged, 2 failed, 1 cut off." in told
    assert "It has not come to its end" in told


def test_complete_trial_without_an_end_in_the_ledger_is_done(tmp_path: Path):
    folder = run_dirs.write_sweep(
        tmp_path / "s", [{"state": "cut off", "params": {"seed": 1}}, {"state": "queued", "params": {}}]
    )
    assert [run.state for run in read_runs([folder])] == ["cut off"]
    run_dirs.write_run(folder / "000")
    held = run_lock.lock_file(folder / "sweep.lock", "sweep.dir")
    [run] = read_runs([folder])
    assert (run.state, run.end_reason) == ("done", "")
    assert run.sweep
    assert run.sweep.status_text().endswith("2 trials: 1 done, 1 queued. It is running.")
    held.close()


def test_sweep_axes_are_its_varied_keys_scaled_as_in_its_space(made):
    runs, _ = made
    assert differing_keys(runs) == ["optimizer", "optimizer.lr", "model.dropout"]
    coordinates = parallel_axes.parallel_coordinates(runs)
    assert coordinates
    assert [(axis.key, axis.kind) for axis in coordinates.axes] == [
        ("optimizer", "name"), ("optimizer.lr", "log"), ("model.dropout", "linear"), ("val_loss", "linear")
    ]  # fmt: skip
    assert [len(values) for values in coordinates.values] == [4] * 20 + [
        3
    ] * 19  # what ended early has no loss to compare
    for axis in coordinates.axes:
        places = [at for at, _ in axis.ticks]
        assert places == sorted(places)
        assert all(b - a >= parallel_axes.MIN_TICK_GAP for a, b in itertools.pairwise(places)), axis


def test_many_runs_are_colored_by_score_and_early_ends_grey(made):
    runs, _ = made
    (low, high), looks = score_range(runs), line_styles(runs)
    order = ranked_runs(runs)
    assert low == order[0][0]
    assert {look for run, look in zip(runs, looks, strict=True) if run.state != "done"} == {(NEUTRAL, "solid")}
    assert len({look for run, look in zip(runs, looks, strict=True) if run.state == "done"}) > 10
    order[-1][1].summary["val_loss"] = 1e9  # one that is far off leaves the others their colours
    assert score_range(runs)[1] < high + 1
    order[-1][1].summary["val_loss"] = order[-1][0]
    went = search_history(runs)
    assert went
    assert len(went.dots) == 40
    scores = [score for _, score in went.best]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] == order[0][0]


def test_a_sweeps_own_metric_and_direction_decide(tmp_path: Path):
    trials = [{"state": "done", "params": {"seed": i}, "values": [v]} for i, v in enumerate((0.7, 0.9, 0.8))]
    folder = run_dirs.write_sweep(tmp_path / "acc", trials, metric="accuracy", direction="maximize")
    runs = read_runs([folder])
    assert [run.name for run in best_runs(runs)] == ["acc-001"]
    for run, value in zip(runs, (0.7, 0.9, 0.8), strict=True):
        assert run.score == value
    assert page.page_data(runs, None, None)["goals"] == [
        {"key": "accuracy", "least": False, "title": "accuracy", "unit": "accuracy"}
    ]
    run_dirs.write_run(tmp_path / "alone")
    assert all(run.goal.metric == "val_loss" for run in read_runs([folder, tmp_path / "alone"])), (
        "no accuracy is known of the other"
    )


def test_best_runs_of_several_goals_are_the_pareto_front(tmp_path: Path):
    values = [[3.0, 10.0], [2.5, 5.0], [2.8, 4.0], [2.0, 1.0]]
    trials = [
        {"state": "done", "params": {"model.layers": i + 1}, "loss": v[0], "values": v} for i, v in enumerate(values)
    ]
    ways = {"metric": ["val_loss", "tokens_per_s"], "direction": ["minimize", "maximize"]}
    runs = read_runs([run_dirs.write_sweep(tmp_path / "s", trials, **ways)])
    assert (
        verdict(runs)
        == "By val_loss and tokens_per_s together, no other run is better than these: s-003, s-001, s-000."
    )
    coordinates = parallel_axes.parallel_coordinates(runs)
    assert coordinates
    assert [axis.key for axis in coordinates.axes] == ["model.layers", "val_loss", "tokens_per_s"]


def test_comment_of_a_sweep_has_the_best_first_and_folds_the_rest(made):
    runs, _ = made
    mattered = key_importances(runs)
    assert mattered
    assert mattered.keys[0].key == "optimizer.lr"
    text = markdown.render_comment(runs, mattered, None)
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| run", "| ---"))]
    assert len(rows) == 40
    assert rows[0].startswith("| **lr-")
    assert "(best) | done |" in rows[0]
    assert text.index("<details><summary>28 more</summary>") > text.index(rows[0])
    assert "Sweep lr (tpe, asha pruner) of optimizer, optimizer.lr, model.dropout: 40 trials" in text
    assert "Which keys mattered (error when shuffled, nats per token; from 20 runs" in text
    assert text.count("(diverged): 10 updates in a row") == 3


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([], "no run in"),
        (["queued"], "no run in"),
        (["failed"], "No run is finished"),
        (["pruned", "cut off"], "No run is finished"),
    ],
)
def test_sweep_without_a_finished_trial_is_described_in_words(tmp_path: Path, capsys, ends: list[str], said: str):
    folder = run_dirs.write_sweep(tmp_path / "s", [trial(i, end) for i, end in enumerate(ends)], spaces=SPACES)
    code = command.main([str(folder), "--format", "md"])
    out = capsys.readouterr()
    assert said in out.out + out.err
    assert code == (2 if said == "no run in" else 0)
    assert command.main([str(folder), "--out", str(tmp_path / "out")]) == code


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)
RECORD = st.fixed_dictionaries(
    {"event": st.sampled_from(["sweep", "trial", "start", "end"])},
    optional={
        "trial": st.integers(-1, 5) | JSON,
        "params": JSON,
        "grid": st.lists(JSON) | JSON,
        "sweep": JSON,
        "axes": JSON,
    }
    | {"state": st.sampled_from(["done", "pruned", "failed"]) | JSON, "step": JSON, "values": JSON, "why": JSON},
)


def as_ledger(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary() | st.lists(RECORD).map(as_ledger))
def test_review_survives_any_content_of_a_ledger(tmp_path: Path, content: bytes):
    folder = tmp_path / "fuzzed"
    for i in range(3):
        if not (folder / f"{i:03}").exists():
            run_dirs.write_run(folder / f"{i:03}", 3.0 + i, lines=10, seed=i)
    (folder / "ledger.jsonl").write_bytes(content)
    runs = read_runs([folder])
    assert len(runs) >= 3
    json.loads(page.embed_json(page.page_data(runs, None, None)))
    markdown.render_comment(runs, None, None)


@pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
def test_sweep_page_in_a_browser_sorts_columns_and_charts_all_trials(made):
    runs, out = made
    drawn = "[...new Set(document.getElementById('%s').data.map(t => t.meta).filter(Boolean))].length"
    with Browser() as browser:
        browser.open(out / "review.html")
        keys = browser.value("[...document.querySelectorAll('#table th')].map(th => th.dataset.key)")
        assert keys[:6] == ["name", "state", "val_loss", "optimizer", "optimizer.lr", "model.dropout"]
        for i, key in enumerate(keys):
            ways = {}
            for _ in range(2):
                browser.value(f"document.querySelector('th[data-key=\"{key}\"] button').click()")
                way = browser.value(f"document.querySelector('th[data-key=\"{key}\"]').ariaSort")
                texts = browser.value(
                    f"[...document.querySelectorAll('#table tbody tr')].map(row => row.children[{i}].textContent)"
                )
                there = [text for text in texts if text.strip()]
                assert texts[: len(there)] == there, f"{key}: what is missing comes last"
                ways[way] = there
            assert ways["ascending"] == ways["descending"][::-1] or len(set(ways["ascending"])) < len(there), key
            if key not in ("name", "state", "optimizer", "notes"):
                assert list(map(float, ways["ascending"])) == sorted(map(float, ways["descending"])), key
        assert browser.value("document.querySelectorAll('#table .state.best').length") == 1
        for state, count in (("done", 20), ("pruned", 14), ("diverged", 3), ("failed", 2)):
            assert browser.value(f"document.querySelectorAll('#table .state.{state}').length") == count
        assert browser.value("document.querySelector('#table .state.failed').parentElement.title") == WHY["failed"]
        assert "model.heads=3" in browser.value("document.getElementById('failures').textContent")
        assert (
            browser.value(drawn % "loss") == browser.value(drawn % "speed") == 38
        )  # two failed before they had a folder
        assert browser.value("document.getElementById('search').data.slice(1).flatMap(t => t.x).length") == 40
        assert browser.value(drawn % "parallel") == 39  # all but the one that was cut off
        assert browser.value("document.getElementById('importance').data[0].y.length") == 3
        assert browser.value("document.getElementById('goodput').data[0].y.length") >= 20
        assert browser.value("document.getElementById('sample-text').textContent") == "def f(x):\n    return x"
        assert browser.messages == []
    assert {file.stem for file in out.glob("*.png")} >= {"search", "parallel", "importance", "goodput", "loss_steps"}
    assert len(runs) == 40
