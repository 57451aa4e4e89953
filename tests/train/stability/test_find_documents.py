"""The documents that trace finds in a step are those that the step was made of."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from helpers import gloo_ranks

from train.__main__ import main
from train.batch import IGNORE
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.sampling.batch_plan import Cursor
from train.errors import UserError
from train.stability.find_documents import trace_step


def test_every_document_of_the_corpus_has_its_source_file(corpus: Path):
    opened = Corpus(corpus).split("train")
    expected = []
    for shard in sorted(corpus.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            metas = [member for member in tar if member.name.endswith(".meta.json")]
            expected += [json.load(tar.extractfile(member))["source"] for member in metas]
    assert [opened.source(n) for n in range(opened.samples)] == expected


@pytest.mark.parametrize("pack", ["true", "false"])
def test_documents_of_a_step_are_its_targets(make, corpus: Path, pack: str):
    config = make(f"data.pack={pack}", "steps=60", "log_every=1", "eval_every=0", "save_every=0")
    gloo_ranks.train_world(config, corpus)
    folder, opened = Path(config.run.dir or ""), Corpus(corpus)
    loader = training_loader(opened, config, RankShare(0, 1, 4))
    lines = gloo_ranks.metrics(config)
    for step in (1, 2, 59):  # the last of them in a later epoch
        (batch,) = loader.peek(loader.plan.after(Cursor(), step - 1))
        data_hash, parts = trace_step(folder, step)
        assert data_hash == lines[step - 1]["data_hash"]
        for row in range(4):
            spans = [(int(p.document.removeprefix("train/")), *p.tokens) for p in parts if p.row == row]
            expected = []
            for n, *span in spans:
                expected += [*opened.split("train").document(n), 256][slice(*span)]
            targets = batch["targets"][row]
            assert targets[targets != IGNORE].tolist() == expected
        assert {part.row for part in parts} <= set(range(4))


def test_trace_prints_a_table_or_json_and_marks_skipped_rows(make, corpus: Path, capsys):
    config = make("steps=2", "eval_every=0")
    gloo_ranks.train_world(config, corpus)
    folder = Path(config.run.dir or "")
    line = {"step": 2, "how": "in place", "skipped": [{"epoch": 0, "position": 16, "rows": [1]}]}
    (folder / "skipped.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["trace", f"run.dir={folder}", "step=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {part["row"] for part in found["parts"] if part["skipped"]} == {1}
    assert all(part["source"].endswith(".txt") and part["words"] for part in found["parts"])
    assert main(["trace", f"run.dir={folder}", "step=1"]) == 0
    assert "begins with" in capsys.readouterr().out
    assert main(["trace", f"run.dir={folder}", "step=x"]) == 2
    with pytest.raises(UserError, match="has the steps 1 to 2"):
        trace_step(folder, 3)
