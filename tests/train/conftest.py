"""Fixtures of the tests of training: whole configurations of small runs, and batches of packed documents."""

from pathlib import Path

import pytest
import torch
import yaml

from train.batch import IGNORE
from train.config import schema

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def make_config():
    """config(model="gpt_tiny", seq_len=, isolate=, objective=, **keys of the model): by default the first objective
    that fits.
    """

    def make(model="gpt_tiny", seq_len=32, isolate=True, seed=0, objective=None, **keys):
        chosen = yaml.safe_load((CONF / f"model/{model}.yaml").read_text())
        name = (objective or {}).get("name", schema.kinds("model")[chosen["family"]].objectives[0])
        usual = yaml.safe_load((CONF / f"objective/{name}.yaml").read_text())
        return schema.Config.model_validate(
            {
                "run": {},
                "steps": 10,
                "seed": seed,
                "log_every": 1,
                "eval_every": 0,
                "save_every": 0,
                "keep_last": 1,
                "keep_best": 0,
                "batch": {"global": 8, "seq_len": seq_len},
                "model": {**chosen, **keys},
                "objective": usual | (objective or {}),
                "data": {"source": "stdlib", "tokenizer": {"kind": "bytes"}, "isolate": isolate},
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "schedule": {"name": "constant"},
                "zero": {"stage": 0},
                "precision": {"name": "fp32"},
                "cluster": {},
                "tracking": {},
                "generation": {"prompts": []},
            }
        )

    return make


@pytest.fixture
def pack():
    """pack([[tokens of a document, ...], ... rows], seq_len) -> Batch: each row's documents in turn, padded."""

    def build(rows, seq_len):
        shape = len(rows), seq_len
        batch = {
            "tokens": torch.zeros(shape, dtype=torch.int64),
            "targets": torch.full(shape, IGNORE),
            "positions": torch.zeros(shape, dtype=torch.int64),
            "segments": torch.zeros(shape, dtype=torch.int32),
        }
        for row, documents in enumerate(rows):
            start = 0
            for number, document in enumerate(documents, 1):
                size = len(document) - 1
                place = slice(start, start + size)
                batch["tokens"][row, place] = torch.tensor(document[:-1])
                batch["targets"][row, place] = torch.tensor(document[1:])
                batch["positions"][row, place] = torch.arange(size)
                batch["segments"][row, place] = number
                start += size
        return batch

    return build
