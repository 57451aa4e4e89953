"""Two runs that are the same are found to be, and what differs is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import gloo_ranks

from train.errors import UserError
from train.run_dir.compare import compare


def test_compare_names_the_differences_of_two_runs(make, corpus: Path, tmp_path: Path):
    config = make("steps=4", "eval_every=0", "save_every=2", "zero=2", "cluster.workers=2")
    gloo_ranks.train_world(config, corpus)
    ours, theirs = Path(config.run.dir or ""), tmp_path / "theirs"
    shutil.copytree(ours, theirs)
    same = compare(ours, theirs, 4)
    assert [finding.difference for finding in same] == [None] * len(same)
    assert {"loss", "data_hash", "tensors of weight", "tensors of exp_avg"} <= {finding.subject for finding in same}
    lines = [json.loads(line) for line in (theirs / "metrics.jsonl").read_text().splitlines()]
    lines[2]["data_hash"] = "0"
    (theirs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] != 4))
    other = {finding.subject: finding.difference for finding in compare(ours, theirs, 4)}
    assert other["data_hash"].startswith("step 3")
    assert other["loss"].startswith("step 4")
    another = make("steps=4", "eval_every=0", "save_every=2", "optimizer.lr=2e-2", name="another")
    gloo_ranks.train_world(another, corpus)
    assert (
        "apart by"
        in {f.subject: f.difference for f in compare(ours, Path(another.run.dir or ""), 4)}["tensors of weight"]
    )
    with pytest.raises(UserError, match="no complete checkpoint of step 3"):
        compare(ours, theirs, 3)
