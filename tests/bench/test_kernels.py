"""Benchmarks of the kernels and of a training step, run whole at their smallest size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels as bench
from bench.tools import goals, measure
from bench.tools.cases import BOTH, OPS, OURS, Size, documents

ROOT = Path(__file__).resolve().parents[2]


def test_bench_kernels_has_rows_of_every_op_beside_its_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "rows.jsonl"
    assert (
        bench.main(["--quick", "--seconds", "0", "--minutes", "60", "--without", "torch.compile", "--out", str(out)])
        == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for op in OPS:
        mine = [row for row in rows if row["op"] == op]
        assert {row["variant"] for row in mine} > {OURS}, op
        assert not [row for row in mine if "failed" in row]
        assert all(row["ms"] > 0 and row["rate"] > 0 for row in mine)
        assert any(row["peak_bytes"] > 0 for row in mine if row["mode"] == BOTH)
    assert {"device", "torch", "triton", "commit", "date", "matmul_flops", "copy_bytes"} <= set(rows[0])
    shown = capsys.readouterr().out
    for words in ("measured here", "peak / liger", f"{len(rows)} rows added to"):
        assert words in shown


def test_bench_kernels_names_an_unknown_op(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench.main(["--ops", "rms_norm,atention"])
    assert "no op atention" in capsys.readouterr().err


def test_take_turns_reports_a_failing_variant():
    def broken() -> None:
        raise RuntimeError("no room\nat all")

    times, failed = measure.time_in_turns(
        {"good": lambda: None, "bad": broken}, Size(bench.torch.device("cpu"), True).device, 0.0
    )
    assert failed == {"bad": "RuntimeError: no room"}
    assert len(times["good"].device) == measure.MIN_ROUNDS


def test_goals_are_ratios_within_the_rounds_of_one_run():
    about = {"op": "attention", "shape": "s", "mode": BOTH}
    rows = [
        {**about, "variant": OURS, "rounds": [1.0, 2.0, 3.0]},
        {**about, "variant": "sdpa flash", "rounds": [2.0, 2.0, 6.0]},
    ]
    found = [(result.what, result.found, result.reached) for result in goals.speeds(rows)]
    assert found == [("speed / sdpa flash", 2.0, True)]


def test_documents_fill_their_rows():
    ids, lengths = documents(2, 100, 10)
    assert sum(lengths) == ids.numel()
    counts = [row.unique_consecutive(return_counts=True)[1] for row in ids]
    assert torch.cat(counts).tolist() == lengths


def test_bench_mfu_times_a_step_by_part(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    small = ["model.layers=1", "model.width=32", "model.vocab_size=64", "batch.global=2", "batch.seq_len=16"]
    command = [sys.executable, "-m", "bench.mfu", "--steps", "2", "--models", "gpt_tiny", "--out", str(out), *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_BUILD_OPS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text())
    assert {"attention", "matrix products", "optimizer", "loss", "norms", "other"} <= {
        p for p, ms in row["parts"].items() if ms > 0
    }
    assert row["tokens_per_s"] == pytest.approx(32 / row["ms"] * 1e3)
    assert 0 < row["mfu"] < 1
    assert "goal: 0.5" in done.stdout
