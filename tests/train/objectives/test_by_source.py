"""The training loss of each source of a mixture: that of its rows alone."""

import pytest
import torch
from helpers import gloo_ranks

from train.batch import IGNORE
from train.objectives import build_objective

MIX = ["data=mix", "data.sources={b: {dir: x}, a: {dir: y}}", *gloo_ranks.TEXT[1:]]


def batch_of(rows: int, length: int, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 200, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    segments = torch.ones(rows, length, dtype=torch.int32)
    return {"tokens": tokens, "targets": targets, "positions": positions, "segments": segments}


OBJECTIVES = {
    "causal": [],
    "masked": ["objective=masked", "objective.next_sentence=false", "model=bert_tiny"],
    "classify": ["objective=classify", "data.pack=false", "data.label_key=label", "objective.classes=[x,y,z]"],
    "score": ["objective=classify", "data.pack=false", "data.label_key=label"],
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_loss_of_a_source_is_that_of_its_rows_alone(name):
    config = gloo_ranks.compose(*MIX, *OBJECTIVES[name], "model.layers=1", "model.dropout=0")
    objective = build_objective(config, 257)
    assert objective.sources == ("a", "b")
    torch.manual_seed(0)
    targets = torch.randint(0, 3, (5,)) if name == "classify" else torch.randint(0, 200, (5, 16))
    targets = torch.rand(5) if name == "score" else targets
    batch = batch_of(5, 16, targets)
    if targets.ndim == 2:
        targets[torch.rand(5, 16) < 0.3] = IGNORE
    batch["source"] = torch.tensor([2, 1, 1, 2, 0])
    losses = objective(batch)
    for number, source in ((1, "a"), (2, "b")):
        rows = {key: value[batch["source"] == number] for key, value in batch.items() if key != "source"}
        total, count = objective(rows)["loss"]
        assert losses[f"loss/{source}"][0].item() == pytest.approx(total.item(), rel=1e-5)
        assert losses[f"loss/{source}"][1] == count
        assert not losses[f"loss/{source}"][0].requires_grad
    assert "loss/a" not in objective({key: value for key, value in batch.items() if key != "source"})
