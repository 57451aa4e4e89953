"""Tests of classification: pooling by the mean of a row's hidden states."""

from __future__ import annotations

import pytest
import torch

from train.objectives import build_objective

SIZES = {"layers": 2, "width": 32, "vocab_size": 64}


@pytest.mark.parametrize("model", ["bert_tiny", "gpt_tiny", "lstm_tiny"])
def test_mean_pooling_leaves_out_padding(make_config, model: str):
    objective = {"name": "classify", "classes": ["a", "b", "c"], "pool": "mean"}
    built = build_objective(make_config(model, objective=objective, **SIZES), 64).eval()
    assert not [name for name, _ in built.named_parameters() if "pooler" in name]
    tokens = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([12, 5, 0])
    segments = (torch.arange(12) < sizes[:, None]).int()
    batch = {"tokens": tokens, "positions": torch.arange(12).expand(3, 12), "segments": segments}
    with torch.no_grad():
        logits, hidden = built.logits(batch), built.backbone(batch, True)
        for row, size in enumerate(sizes.tolist()):
            mean = hidden[row, :size].mean(0) if size else torch.zeros(32)
            torch.testing.assert_close(logits[row], built.head(mean))
        other = batch | {"tokens": tokens.where(segments > 0, 7)}
        torch.testing.assert_close(built.logits(other), logits)
