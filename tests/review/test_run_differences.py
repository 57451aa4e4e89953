"""Comparison of runs: differing keys, verdict, noise, importance, axes; thinning of curves; the comment."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers import run_dirs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from review import markdown
from review.downsample import extreme_indices, moving_average
from review.html.parallel_axes import axis_position, parallel_coordinates
from review.importance import key_importances
from review.run_differences import comparability_warnings, differing_keys, seed_noise, verdict
from review.run_reader import RunRecord, read_run
from review.wall_time import time_shares


def write_and_read(tmp_path: Path, *runs: dict) -> list[RunRecord]:
    return [read_run(run_dirs.write_run(tmp_path / f"run{i}", **run)) for i, run in enumerate(runs)]


def test_comment_has_columns_of_speed_where_any_run_was_measured(tmp_path: Path):
    runs = write_and_read(tmp_path, {}, {"finished": False})
    assert "| goodput | tokens/s |" in markdown.render_comment(runs, None, None)
    runs[0].summary |= {"tokens_per_s": 84300.0, "mfu": 0.4123, "gpu_peak_gib": 61.37}
    head, _, *rows = [line for line in markdown.render_comment(runs, None, None).splitlines() if line.startswith("|")]
    assert head.endswith("| goodput | tokens/s | MFU | GPU GiB |")
    assert rows[0].endswith("| 84.3k | 41.2% | 61.4 |")
    assert rows[1].endswith("| 5k |  |  |")


def test_comment_tells_what_was_read_of_each_source_of_a_mixture(tmp_path: Path):
    [run] = write_and_read(tmp_path, {})
    assert " epochs" not in markdown.render_comment([run], None, None)
    run.summary |= {"tokens/code": 84300, "epochs/code": 0.754, "val_loss/code": 2.5, "tokens/a|b": 5, "epochs/a|b": 2}
    lines = markdown.render_comment([run], None, None).splitlines()
    expected = f"- {run.name}: code 84.3k tokens, 0.75 epochs, held-out loss 2.5000; a&#124;b 5 tokens, 2.00 epochs"
    assert expected in lines


def test_differing_keys_leave_out_names_and_logging(tmp_path: Path):
    runs = write_and_read(tmp_path, {"optimizer__lr": 1e-3, "log_every": 5}, {"optimizer__lr": 2e-3})
    assert differing_keys(runs) == ["log_every", "optimizer.lr"]
    coordinates = parallel_coordinates(runs)
    assert coordinates is not None
    assert [axis.key for axis in coordinates.axes] == ["optimizer.lr", "val_loss"]  # how often it logs trains nothing


def test_verdict_names_the_best_with_its_distance_and_seed_noise(tmp_path: Path):
    unsure = write_and_read(tmp_path / "a", {"loss": 3.0, "optimizer__lr": 1e-3}, {"loss": 3.1, "optimizer__lr": 2e-3})
    assert "Best: run0, held-out loss 3.0000, 0.1000 nats per token (3.23%) below run1" in verdict(unsure)
    assert "how much of that is noise is unknown" in verdict(unsure)
    pairs = itertools.product((1e-3, 2e-3), (0, 1, 2))
    seeds = [{"loss": 3 + lr * 100 + s / 100, "optimizer__lr": lr, "seed": s} for lr, s in pairs]
    sure = write_and_read(tmp_path / "b", *seeds)
    assert seed_noise(sure) == (pytest.approx(0.01), 4)
    assert "more than noise" in verdict(sure)
    near = [{**run, "loss": run["loss"] - (0.095 if run["optimizer__lr"] > 1e-3 else 0)} for run in seeds]
    assert "within noise" in verdict(write_and_read(tmp_path / "c", *near))


def test_verdict_is_refused_with_a_warning_for_different_corpora(tmp_path: Path):
    runs = write_and_read(tmp_path, {"loss": 3.0}, {"loss": 2.0, "seed": 1})
    runs[1].corpus = "another"
    assert "not comparable" in comparability_warnings(runs)[0]
    assert verdict(runs).startswith("No verdict")


def test_verdict_is_refused_with_a_warning_for_different_tasks(tmp_path: Path):
    words, spans = {"objective__name": "masked", "loss": 3.0}, {"objective__name": "seq2seq", "loss": 2.0}
    assert verdict(write_and_read(tmp_path / "a", words, spans)).startswith("No verdict")
    rates = write_and_read(tmp_path / "b", {**words, "objective__rate": 0.15}, {**words, "objective__rate": 0.3})
    assert "different tasks" in comparability_warnings(rates)[0]
    smoothed = {**words, "objective__label_smoothing": 0.1, "loss": 2.9}
    assert verdict(write_and_read(tmp_path / "c", words, smoothed)).startswith("Best: run1"), (
        "held-out losses are never smoothed"
    )


def test_verdict_ignores_an_unfinished_run(tmp_path: Path):
    runs = write_and_read(tmp_path, {"loss": 3.0}, {"loss": 2.0, "finished": False})
    assert verdict(runs) == "One finished run: run0, held-out loss 3.0000."
    assert verdict(runs[1:]) == "No run is finished: there is nothing to compare yet."


def test_importance_ranks_the_key_that_matters_first_others_near_zero(tmp_path: Path):
    rng = np.random.default_rng(0)
    pairs = itertools.product(range(6), (1e-4, 3e-4, 1e-3, 3e-3))
    rows = [(lr, int(rng.integers(0, 3)), seed) for seed, lr in pairs]
    runs = write_and_read(
        tmp_path,
        *(
            {"loss": 3 + abs(np.log(lr / 1e-3)), "lines": 5, "optimizer__lr": lr, "schedule__warmup": w, "seed": s}
            for lr, w, s in rows
        ),
    )
    report = key_importances(runs)
    assert report is not None
    assert [key.key for key in report.keys] == ["optimizer.lr", "schedule.warmup"]
    first, second = report.keys
    assert first.low > 0.3
    assert abs(second.mean) < 0.05
    assert report.explained > 0.9
    assert key_importances(runs[:7]) is None


def test_time_shares_use_recorded_causes_else_goodput(tmp_path: Path):
    run = write_and_read(tmp_path, {})[0]
    assert time_shares(run) == {"steps that count": 0.9, "all else": pytest.approx(0.1)}
    run.summary["time_by_cause"] = {"train": 75.0, "restart": 25, "lost": 0.0, "odd": "x"}
    assert time_shares(run) == {"train": 0.75, "restart": 0.25}


def test_axis_positions_by_log_number_and_name(tmp_path: Path):
    runs = write_and_read(
        tmp_path,
        *(
            {"optimizer__lr": lr, "zero__stage": s, "precision__name": p}
            for lr, s, p in ((1e-4, 0, "fp32"), (1e-3, 1, "bf16"), (1e-2, 2, "bf16"))
        ),
    )
    coordinates = parallel_coordinates(runs)
    assert coordinates is not None
    kinds = {axis.key: axis for axis in coordinates.axes}
    assert {key: axis.kind for key, axis in kinds.items()} == {
        "optimizer.lr": "log", "zero.stage": "linear", "precision.name": "name", "val_loss": "linear"
    }  # fmt: skip
    assert axis_position(kinds["optimizer.lr"], 1e-3) == pytest.approx(0.5)
    assert axis_position(kinds["precision.name"], "fp32") == 1.0
    assert axis_position(kinds["val_loss"], 3.0) == 0.5  # all the same


CURVES = arrays.arrays(float, st.integers(1, 400), elements=st.floats(-1e6, 1e6) | st.just(float("nan")))


@settings(deadline=None)
@given(CURVES, st.integers(4, 60))
def test_extreme_indices_keep_extremes_and_both_ends(values: np.ndarray, most: int):
    kept = extreme_indices([values], most)
    assert len(kept) <= max(most, 4) + 2
    assert {kept[0], kept[-1]} == {0, len(values) - 1}
    assert all(a < b for a, b in itertools.pairwise(kept))
    if np.isfinite(values).any():
        assert np.nanmax(values[kept]) == np.nanmax(values)
        assert np.nanmin(values[kept]) == np.nanmin(values)


@settings(deadline=None)
@given(CURVES, st.floats(0, 0.5))
def test_moving_average_equals_mean_of_finite_neighbours(values: np.ndarray, share: float):
    reach = int(len(values) * share / 2)
    averaged = moving_average(values, share)
    for i in range(len(values)):
        near = values[max(i - reach, 0) : i + reach + 1]
        near = near[np.isfinite(near)]
        assert averaged[i] == pytest.approx(near.mean(), abs=1e-4) if len(near) else np.isnan(averaged[i])


def test_comment_with_hostile_names_stays_one_table(tmp_path: Path):
    evil = "a|b `x` <img src=x onerror=alert(1)> @all\n| c | [d](http://e) ![i](http://e/f.png)"
    runs = write_and_read(
        tmp_path, {"optimizer__lr": 1e-3, "tracking__tags": [evil]}, {"optimizer__lr": 2e-3, "finished": False}
    )
    runs[0].name = evil
    text = markdown.render_comment(runs, None, None)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert not any(sign in text for sign in ("<img", "@all", "http://", "`x`"))
    assert "(so far)" in table[3]
    assert text.startswith("**One finished run")
