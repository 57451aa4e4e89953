"""Run folders of every state are read, and no content of a file makes the reader fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import run_dirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.host import run_lock
from review.html import page
from review.run_reader import find_run_folders, read_run


def test_read_run_tells_the_state_of_every_folder(tmp_path: Path):
    assert read_run(run_dirs.write_run(tmp_path / "done")).state == "done"
    stopped = read_run(run_dirs.write_run(tmp_path / "stopped", finished=False))
    assert stopped.state == "stopped"
    assert stopped.val_loss == pytest.approx(stopped.columns["val_loss"][49])
    (tmp_path / "empty").mkdir()
    assert read_run(tmp_path / "empty").state == "empty"
    assert read_run(tmp_path / "elsewhere").state == "missing"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("a: [1")
    assert read_run(broken).state == "broken"
    assert "config.yaml cannot be read" in read_run(broken).notes[0]


def test_run_is_running_while_its_driver_holds_the_lock(tmp_path: Path):
    folder = run_dirs.write_run(tmp_path / "now", finished=False)
    held = run_lock.lock_run_dir(folder)
    assert read_run(folder).state == "running"
    held.close()
    assert read_run(folder).state == "stopped"


def test_notes_tell_the_last_error_of_each_rank(tmp_path: Path):
    folder = run_dirs.write_run(tmp_path / "fell", finished=False)
    (folder / "logs").mkdir()
    (folder / "logs" / "rank_1.end").write_text(
        json.dumps({"code": 1, "error": "Traceback ...\nValueError: no such thing"})
    )
    assert read_run(folder).notes == ["rank_1: ValueError: no such thing"]


def test_damaged_lines_are_counted_except_a_cut_last_one(tmp_path: Path):
    folder = run_dirs.write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("ab") as out:
        out.write(b'\xff\xfe\n[1]\n{"step": 510, "loss": NaN, "tokens": "many"}\n{"step": 520, "lo')
    run = read_run(folder)
    assert run.notes == ["metrics.jsonl: 2 damaged lines left out"]
    assert run.steps[-1] == 510
    assert np.isnan(run.columns["loss"][-1])


def test_training_seconds_are_tokens_over_speed(tmp_path: Path):
    run = read_run(run_dirs.write_run(tmp_path / "a", lines=10))
    assert run.columns["seconds"] == pytest.approx(20480 / 5000 * np.arange(1, 11))


def test_sample_with_unicode_line_separators_is_read_whole(tmp_path: Path):
    folder = run_dirs.write_run(tmp_path / "a")
    text = "a\u2028b\u0085c\x0bd"
    (folder / "samples.jsonl").write_text(
        json.dumps({"step": 1, "prompt": "", "text": text}, ensure_ascii=False) + "\n"
    )
    assert [s["text"] for s in read_run(folder).samples] == [text]


def test_config_yaml_that_expands_without_end_is_refused(tmp_path: Path):
    folder = run_dirs.write_run(tmp_path / "a")

    def layer(i: int) -> str:
        return f"l{i}: &l{i} {{" + ", ".join(f"k{j}: *l{i - 1}" for j in range(9)) + "}"

    layers = "\n".join(map(layer, range(1, 12)))
    (folder / "config.yaml").write_text("l0: &l0 {a: 1}\n" + layers)
    assert "more than 200,000 values" in read_run(folder).notes[0]
    (folder / "config.yaml").write_text("{a: " * 5000)
    assert "cannot be read" in read_run(folder).notes[0]


def test_find_run_folders_searches_two_levels_deep(tmp_path: Path):
    for name in ("a", "sweep/b", "sweep/c"):
        run_dirs.write_run(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert [str(p.relative_to(tmp_path)) for p in find_run_folders([tmp_path])] == ["a", "empty", "sweep/b", "sweep/c"]
    assert find_run_folders([tmp_path / "a", tmp_path / "a", tmp_path / "no"]) == [tmp_path / "a", tmp_path / "no"]


FILES = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "samples.jsonl",
    "run.json",
    "corpus.json",
    "lock",
    "startup.json",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KNOWN = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("step", "steps", "loss", "val_loss", "tokens", "goodput", "prompt", "run", "text"), JSON),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), content=st.binary() | (JSON | KNOWN).map(lambda v: json.dumps(v).encode() + b"\n"))
def test_review_survives_any_content_of_any_file(tmp_path: Path, name: str, content: bytes):
    folder = run_dirs.write_run(tmp_path / "fuzzed", lines=10)
    (folder / name).write_bytes(content)
    runs = [read_run(folder), read_run(run_dirs.write_run(tmp_path / "whole", lines=10))]
    json.loads(page.embed_json(page.page_data(runs, None, None)))
