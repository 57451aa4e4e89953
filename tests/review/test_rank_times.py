"""Seconds of a step by rank, from the lines that the driver writes to the page and the comment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_dirs

from cluster.supervision import hang_detector
from review import markdown
from review.html import page
from review.rank_times import is_notable, slowest_rank_text, thin_windows
from review.run_reader import RunRecord, read_run


def run_with(folder: Path, *lines: str) -> RunRecord:
    """A finished run with these lines in its ``ranks.jsonl``."""
    run_dirs.write_run(folder)
    (folder / "ranks.jsonl").write_text("".join(line + "\n" for line in lines))
    return read_run(folder)


def window(step: int, *seconds: float) -> str:
    """The line that the driver writes for ranks with these seconds."""
    return json.dumps({"step": step, **hang_detector.summarise_steps(dict(enumerate(seconds)))})


LAGGING = [
    window(10, 1.0, 1.1, 1.5, 1.0),
    window(20, 1.0, 1.0, 1.4, 1.1),
    window(30, 2.6, 1.0, 1.2, 1.1),
    window(40, 1.0, 1.0, 1.3, 1.0),
]


def test_slowest_rank_and_widest_spread_are_named(tmp_path: Path):
    run = run_with(tmp_path / "a", *LAGGING)
    assert [w.slowest_rank for w in run.rank_windows] == [2, 2, 0, 2]
    assert slowest_rank_text(run.rank_windows) == (
        "rank 2 was the slowest in 3 of 4 windows, with 1.33 times the median rank's seconds; "
        "the widest spread was at step 30: 1 to 2.6 s, rank 0 the slowest"
    )
    assert run.notes == []


def test_window_of_a_step_made_again_is_the_last_one(tmp_path: Path):
    run = run_with(tmp_path / "a", window(10, 1.0, 3.0), window(20, 1.0, 1.2), window(10, 1.0, 2.0))
    assert [(w.step, w.slowest_s) for w in run.rank_windows] == [(10, 2.0), (20, 1.2)]


def test_run_of_one_rank_or_without_the_file_has_no_ranks(tmp_path: Path):
    assert run_with(tmp_path / "one", window(10, 1.0), window(20, 1.1)).rank_windows == []
    assert read_run(run_dirs.write_run(tmp_path / "none")).rank_windows == []


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x"}',
        '{"step": 1, "rank_step_s_min": NaN, "rank_step_s_median": 1, "rank_step_s_max": 1, "slowest_rank": 0}',
        '{"step": 1, "rank_step_s_min": 2, "rank_step_s_median": 1, "rank_step_s_max": 1, "slowest_rank": 0}',
        '{"step": 1, "rank_step_s_min": 0, "rank_step_s_median": 0, "rank_step_s_max": 1, "slowest_rank": 0}',
        '{"step": 1, "rank_step_s_min": 1, "rank_step_s_median": 1, "rank_step_s_max": 1, "slowest_rank": "<b>"}',
        '{"step": true, "rank_step_s_min": 1, "rank_step_s_median": 1, "rank_step_s_max": 2, "slowest_rank": 0}',
    ],
    ids=["no numbers", "nan", "min above max", "zero", "rank is text", "step is no number"],
)
def test_lines_that_make_no_sense_are_left_out(tmp_path: Path, line: str):
    assert [w.step for w in run_with(tmp_path / "a", line, *LAGGING).rank_windows] == [10, 20, 30, 40]


def test_damaged_line_is_noted_once(tmp_path: Path):
    run = run_with(tmp_path / "a", "{", *LAGGING)
    page.page_data([run], None, None)
    assert run.notes == ["ranks.jsonl: 1 damaged line left out"]


def test_page_has_the_curve_of_the_slowest_rank(tmp_path: Path):
    run = run_with(tmp_path / "a", *LAGGING)
    [shown] = page.page_data([run], None, None)["runs"]
    assert shown["ranks"]["step"] == [10, 20, 30, 40]
    assert shown["ranks"]["slowest_rank"] == [2, 2, 0, 2]
    assert shown["ranks"]["slowest_s"] == [1.5, 1.4, 2.6, 1.3]
    assert shown["ranks"]["text"] == slowest_rank_text(run.rank_windows)
    [without] = page.page_data([read_run(run_dirs.write_run(tmp_path / "b"))], None, None)["runs"]
    assert without["ranks"] is None


def test_thinned_curve_keeps_the_slowest_moment(tmp_path: Path):
    lines = [window(step, 1.0, 9.0 if step == 777 else 1.2) for step in range(1, 2001)]
    thinned = thin_windows(run_with(tmp_path / "a", *lines).rank_windows)
    assert len(thinned) <= 400
    assert max(w.slowest_s for w in thinned) == 9.0


def test_comment_tells_of_a_slow_rank_and_of_no_equal_ones(tmp_path: Path):
    slow = run_with(tmp_path / "slow", *LAGGING)
    even = run_with(tmp_path / "even", window(10, 1.0, 1.02), window(20, 1.03, 1.0))
    assert is_notable(slow.rank_windows)
    comment = markdown.render_comment([slow, even], None, None)
    assert "- slow: rank 2 was the slowest in 3 of 4 windows" in comment
    assert "- even: rank" not in comment
