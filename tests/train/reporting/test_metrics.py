"""Every reported number against scikit-learn's and scipy's on random data; and the same on any count of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from helpers import gloo_ranks

from train.batch import IGNORE
from train.config import load as configuration
from train.config import schema
from train.data.prepare.prepare import prepare
from train.evaluate import sum_over
from train.reporting import metrics


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_classification_metrics_equal_those_of_scikit_learn(classes: int, seed: int):
    draw = np.random.default_rng(seed)
    true = draw.integers(0, classes - (seed == 2), 101)  # the last class may never be true
    said = np.where(draw.random(101) < 0.6, true, draw.integers(0, classes, 101))
    labels = list(range(classes))
    table = sklearn.metrics.confusion_matrix(true, said, labels=labels)
    how = {"labels": labels, "zero_division": 0}
    assert metrics.accuracy(table) == pytest.approx(sklearn.metrics.accuracy_score(true, said))
    for ours, theirs in (
        (metrics.precision, sklearn.metrics.precision_score),
        (metrics.recall, sklearn.metrics.recall_score),
        (metrics.f1, sklearn.metrics.f1_score),
    ):
        np.testing.assert_allclose(ours(table), theirs(true, said, average=None, **how))
        assert metrics.macro(ours(table)) == pytest.approx(theirs(true, said, average="macro", **how))
        assert metrics.classification_metrics(table)["f1_micro"] == pytest.approx(
            theirs(true, said, average="micro", **how)
        )


@pytest.mark.parametrize("seed", range(3))
def test_regression_metrics_equal_those_of_scipy(seed: int):
    draw = np.random.default_rng(seed)
    said, true = draw.normal(size=97), draw.integers(0, 5, 97).astype(float)  # with many ties
    found = metrics.regression_metrics(said, true)
    assert found["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(true, said))
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(said, true).statistic)
    assert math.isnan(metrics.spearman(np.ones(3), np.arange(3.0)))


def test_perplexity_and_bits_per_byte_follow_their_definitions():
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.bits_per_byte(80 * math.log(2), 10) == pytest.approx(8)


HELD_OUT = 37  # a prime, so that no count of ranks divides it


class HeldOut:
    """Groups of three rows, the last of one; ranks take turns."""

    def __init__(self, rank: int, size: int, scores: bool) -> None:
        self.rank, self.size, self.scores, self.groups = rank, size, scores, -(-HELD_OUT // 3)

    def __iter__(self):
        for group in range(self.rank, -(-self.groups // self.size) * self.size, self.size):
            numbers = torch.arange(3 * group, 3 * group + 3)
            real = numbers < (HELD_OUT if group < self.groups else 0)
            targets = torch.where(real, numbers * 7 % 5, IGNORE)
            yield {
                "numbers": numbers,
                "targets": torch.where(real, targets.float(), math.nan) if self.scores else targets,
            }


def measured(world, emit, scores: bool) -> dict:
    from train.objectives.classify import Classifier

    class Backbone(torch.nn.Module):
        model = type("model", (), {"width": 4, "deviation": lambda inputs: 1.0, "dropout": 0.0})

        def pooled(self, batch, isolate):
            return torch.stack([(batch["numbers"] * k).float().sin() for k in range(1, 5)], 1)

    objective = Classifier(
        Backbone(), schema.Classify(name="classify", classes=[] if scores else [*"abcde"]), True
    ).eval()
    with torch.no_grad():
        objective.head.weight.copy_(torch.arange(objective.head.weight.numel()).view_as(objective.head.weight).cos())
        objective.head.bias.zero_()
    sums = sum_over(objective, HeldOut(world.rank, world.size, scores), world, lambda: False)
    return {name: (total.tolist(), count) for name, (total, count) in sums.items()}


@pytest.mark.parametrize("scores", [False, True])
def test_evaluation_sums_are_equal_for_any_number_of_ranks(scores: bool):
    found = []
    for size in (1, 2, 3):
        found += gloo_ranks.run(size, measured, scores)
    assert all(other == found[0] for other in found[1:])
    counts = {name: count for name, (_, count) in found[0].items()}
    assert counts == {"loss": HELD_OUT, "scores" if scores else "confusion": HELD_OUT}
    if scores:
        rows = np.array(found[0]["scores"][0])
        assert rows[:, 1].tolist() == [n * 7 % 5 for n in range(HELD_OUT)]
        assert metrics.regression_metrics(*rows.T)["mse"] == pytest.approx(found[0]["loss"][0] / HELD_OUT)


@pytest.fixture
def labelled(tmp_path: Path):
    """labelled(scores) -> a corpus of texts that say how many words of joy are in them."""

    def build(scores: bool) -> Path:
        draw, lines = np.random.default_rng(0), []
        for n in range(150):
            words = draw.choice(["joy", "woe"], 6, p=[0.9, 0.1] if n % 2 else [0.1, 0.9]).tolist()
            joys = words.count("joy")
            lines.append(
                {"text": f"{n} {' '.join(words)}", "label": joys / 6 if scores else "glad" if joys > 3 else "sad"}
            )
        (tmp_path / "moods.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / "moods.jsonl"

    return build


@pytest.mark.parametrize(
    ("model", "scores"), [("bert", False), ("bert", True), ("gpt", False), ("t5", True), ("gru", False)]
)
def test_classifier_of_any_family_learns_and_reports_metrics(tmp_path: Path, labelled, model: str, scores: bool):
    data = [
        f"data.paths=[{labelled(scores)}]",
        "data.label_key=label",
        "data.pack=false",
        f"data.dir={tmp_path}/corpus",
    ]
    classes = [] if scores else ["objective.classes=[sad,glad]"]
    how = [
        f"model={model}_tiny",
        "precision=fp32",
        "objective=classify",
        *classes,
        "batch.seq_len=32",
        "batch.global=8",
        "cluster.workers=2",
    ]
    rest = [
        "steps=30",
        "eval_every=0",
        "save_every=0",
        "optimizer=adamw",
        "optimizer.lr=3e-3",
        "schedule=constant",
        "tracking=off",
    ]
    config = configuration.load([*gloo_ranks.TEXT, *data, *how, *rest, f"run.dir={tmp_path}/run"])
    corpus = prepare(config.data.model_copy(update={"workers": 1}), lambda event: None)
    gloo_ranks.train_world(config, corpus)
    line, summary = gloo_ranks.metrics(config)[-1], json.loads((tmp_path / "run/summary.json").read_text())
    if scores:
        assert line["mse"] == pytest.approx(line["val_loss"])
        assert line["spearman"] > 0.5
        assert line["mse"] < 0.1
    else:
        assert line["accuracy"] > 0.8
        assert line["accuracy"] == line["f1_micro"] == summary["accuracy"]
        assert set(summary["classes"]) == {"sad", "glad"}
        confusion = np.array(summary["confusion"])
        assert metrics.classification_metrics(confusion)["f1_macro"] == pytest.approx(line["f1_macro"])
    assert summary["perplexity"] is summary["bits_per_byte"] is None
