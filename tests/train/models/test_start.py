"""Tests of untrained models: their loss is about that of a uniform distribution over tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import gloo_ranks

from train.config import load as configuration
from train.config.keys.decoder import Decoder
from train.config.schema import variants
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.sampling.batch_plan import Cursor
from train.objectives import build_objective

CHOICES = sorted(path.stem for path in (configuration.CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_untrained_loss_is_at_most_that_of_chance(corpus: Path, choice: str):
    family = variants("model")[yaml.safe_load((configuration.CONF / f"model/{choice}.yaml").read_text())["family"]]
    small = ["model.vocab_size=512", "batch.seq_len=64", "batch.global=4", "model.dropout=0", "cluster.workers=1"]
    small += ["model.layers=2"] if family is Decoder else []
    keys = [
        f"model={choice}",
        f"objective={family.objectives[0]}",
        *gloo_ranks.TEXT,
        "data.paths=[x]",
        f"data.dir={corpus}",
        *small,
    ]
    config = configuration.load(keys)
    text = Corpus(str(corpus), config.model.special)
    loader = training_loader(text, config, RankShare(0, 1, 4))
    batch = loader.peek(Cursor())[0]
    loader.close()
    objective = build_objective(config, text.tokenizer.vocab_size)
    with torch.no_grad():
        total, count = objective(batch)["loss"]
    assert abs(total / count - math.log(512)) < 1.5
