"""Numbers outlive kills: each step once in metrics.jsonl, one W&B run, and nothing of W&B stops a run."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import gloo_ranks, wandb_files

from train.reporting.goodput import TimeByCause
from train.reporting.tracking import MetricsFile, RunFile
from train.util.io import read_records


def test_metrics_file_drops_torn_lines_and_steps_after_the_checkpoint(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, 8)) + '{"step": 8, "lo')
    metrics = MetricsFile(file, last_step=5)
    metrics.append({"step": 6, "loss": 2.0})
    assert [r["step"] for r in read_records(file)] == [1, 2, 3, 4, 5, 6]
    assert read_records(file)[-1]["loss"] == 2.0


def test_run_file_keeps_the_wandb_id_and_counts_starts(tmp_path: Path):
    first = RunFile(tmp_path, TimeByCause()).values
    second = RunFile(tmp_path, TimeByCause()).values
    assert first["wandb_id"] == second["wandb_id"]
    assert (first["starts"], second["starts"]) == (1, 2)


def test_resumed_offline_run_is_one_wandb_run_with_each_step_once(make, corpus: Path):
    config = make("tracking=wandb", "tracking.wandb=offline", "generation.prompts=[a]", "generation.max_tokens=3")
    gloo_ranks.train_world(config, corpus, {"event": "step", "step": 3})
    gloo_ranks.train_world(config, corpus)
    runs = list((Path(config.run.dir) / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    steps, tables, name = read_wandb(next(runs[0].glob("*.wandb")))
    assert steps == list(range(1, 9))
    assert tables > 0
    assert name == json.loads((Path(config.run.dir) / "run.json").read_text())["wandb_id"]


def read_wandb(file: Path) -> tuple[list[int], int, str]:
    """(the steps that have a loss, the tables logged, the run id) of an offline W&B file."""
    steps, tables, run_id = [], 0, ""
    for record in wandb_files.records(file):
        run_id = record.run.run_id or run_id
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "loss" in items:
                steps.append(record.history.step.num)
            tables += any("samples" in key for key in items)
    return steps, tables, run_id


def test_unreachable_wandb_does_not_stop_a_run(make, corpus: Path, monkeypatch):
    config = make("tracking=wandb", "tracking.wandb=online")
    ranks = gloo_ranks.start(1 + 1, unreachable, gloo_ranks.configuration.to_dict(config), str(corpus)).wait()
    assert [rank.result for rank in ranks] == ["done", "done"]
    notes = [e["text"] for e in ranks[0].events if e["event"] == "note"]
    assert any("W&B" in text and "metrics.jsonl has it all" in text for text in notes)
    assert len(gloo_ranks.metrics(config)) == 8


def unreachable(world, emit, config, corpus: str) -> str:
    """Train against a W&B host that refuses connections."""
    import os

    import train.reporting.tracking

    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    train.reporting.tracking.FINISH_TIMEOUT_S = 3.0
    return gloo_ranks.train(world, emit, config, corpus)
