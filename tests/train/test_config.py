"""From overrides to a checked configuration: every shipped choice works, and every mistake is answered with its cure."""

from __future__ import annotations

import itertools

import pytest
import torch
import yaml

from train import config as configuration
from train import schema
from train.errors import UserError
from train.objectives import build_objective

CHOICES = [(group, choice) for group, choices in configuration.groups().items() for choice in choices]
FITTING = {
    "causal": [],
    "masked": ["model=bert_tiny"],
    "seq2seq": ["model=t5_tiny"],
    "classify": ["model=bert_tiny", "data.label_key=label", "data.pack=false"],
}
"""What an objective needs beside the default."""


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda v: str(v))
def test_every_shipped_choice_composes_and_builds(group: str, choice: str):
    extra = ["data.paths=[x]"] if choice in ("text", "shakespeare_char") else []
    if group == "model":
        family = yaml.safe_load((configuration.CONF / f"model/{choice}.yaml").read_text())["family"]
        extra += [f"objective={schema.kinds('model')[family].objectives[0]}"]
    if group == "objective":
        extra += FITTING[choice]
    extra += ["batch.seq_len=64"] if group == "experiment" else []
    config = configuration.load([f"{group}={choice}", *extra])
    with torch.device("meta"):
        objective = build_objective(config, 4096)
    assert sum(p.numel() for p in objective.parameters()) > 0
    assert configuration.parse(configuration.to_dict(config)) == config


def test_an_override_reaches_its_key_whether_or_not_a_yaml_mentions_it():
    config = configuration.load(["zero.stage=3", "data.dedup=false", "run.name=x", "zero=1", "batch.global=4"])
    assert (config.zero.stage, config.data.dedup, config.run.dir, config.batch.global_) == (3, False, "runs/x", 4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lerning_rate=1"], ["'lerning_rate'", "'optimizer.lr'"]),
        (["optimizer.lrr=1"], ["'optimizer.lr'"]),
        (["n_layer=3"], ["'model.layers'"]),
        (["model=gpt_tny"], ["gpt_tiny"]),
        (["steps=many"], ["steps='many'", "integer"]),
        (["batch.global=1.5"], ["batch.global=1.5"]),
        (["batch.global=8", "data.streams=5"], ["data.streams=5", "batch.global=8", "data.streams=4"]),
        (["batch.global=8", "batch.micro=3"], ["batch.micro=3", "batch.global=8", "cluster.workers=2", "batch.micro=2"]),
        (["batch.global=2", "cluster.workers=3"], ["cluster.workers=3", "data.streams=2"]),
        (["cluster.min_workers=3"], ["cluster.min_workers=3", "cluster.workers=2"]),
        (["batch.seq_len=4096"], ["batch.seq_len=4096", "model.max_len=512"]),
        (["data=text"], ["data.paths"]),
        (["optimizer.lr=1,2"], ["sweep"]),
        (["steps"], ["key=value"]),
        (["model.heads=5"], ["model.heads=5", "model.width=192"]),
    ],
)
def test_a_mistake_is_named_with_its_cure(overrides: list[str], said: list[str]):
    with pytest.raises(UserError) as caught:
        configuration.load(overrides)
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        configuration.load(["lerning_rate=1", "steps=many", "seed=-1", "zero=7"])
    assert all(words in str(caught.value) for words in ("4 problems", "lerning_rate", "steps", "seed", "zero=7"))


def test_the_digest_changes_with_any_value():
    digests = [configuration.digest(configuration.load(o)) for o in ([], ["seed=1"], ["optimizer.eps=1e-7"], ["run.name=b"])]
    assert all(a != b for a, b in itertools.combinations(digests, 2))
    assert configuration.digest(configuration.load([])) == digests[0]


def test_help_names_every_group_and_key():
    text = configuration.help_text()
    assert all(f"{group}=" in text for group in configuration.groups())
    assert all(key in text for key in configuration.keys())  # noqa: SIM118  a function of ours
