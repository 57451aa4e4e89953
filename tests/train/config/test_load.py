"""Tests of loading: every shipped choice works, and every mistake is named with its cure."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from train.config import load as configuration
from train.config import schema, sweep_space
from train.errors import UserError
from train.objectives import build_objective

CHOICES: list[tuple[str, str]] = []
for _group, _choices in configuration.groups().items():
    CHOICES += [(_group, choice) for choice in _choices if _group != "sweep"]
FITTING = {
    "causal": [],
    "masked": ["model=bert_tiny"],
    "seq2seq": ["model=t5_tiny"],
    "classify": ["model=bert_tiny", "data.label_key=label", "data.pack=false"],
}
"""Overrides that an objective needs beside the default configuration."""
DEFAULT = configuration.load([])
NEEDING_PATHS = [
    ("data", "chat"),
    ("data", "text"),
    ("experiment", "shakespeare_char"),
    ("experiment", "shakespeare_race"),
    ("experiment", "transformer_base"),
]
"""Choices that need data.paths."""


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda v: str(v))
def test_every_shipped_choice_composes_and_builds(group: str, choice: str):
    extra = ["data.paths=[x]"] if (group, choice) in NEEDING_PATHS else []
    extra += ["data.sources={a: {dir: x}, b: {paths: [y]}}"] if choice == "mix" else []
    if group == "model":
        family = yaml.safe_load((configuration.CONF / f"model/{choice}.yaml").read_text())["family"]
        extra += [f"objective={schema.variants('model')[family].objectives[0]}"]
    if group == "objective":
        extra += FITTING[choice]
    extra += ["batch.seq_len=64"] if group == "experiment" else []
    config = configuration.load([f"{group}={choice}", *extra])
    with torch.device("meta"):
        objective = build_objective(config, 4096)
    assert sum(p.numel() for p in objective.parameters()) > 0
    assert configuration.parse(configuration.to_dict(config)) == config


def test_override_sets_its_key_with_or_without_a_yaml():
    config = configuration.load(["zero.stage=3", "data.dedup=false", "run.name=x", "zero=1", "batch.global=4"])
    assert (config.zero.stage, config.data.dedup, config.run.dir, config.batch.global_) == (3, False, "runs/x", 4)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lerning_rate=1"], ["'lerning_rate'", "'optimizer.lr'"]),
        (["optimizer.lrr=1"], ["'optimizer.lr'"]),
        (["n_layer=3"], ["'model.layers'"]),
        (["model=gpt_tny"], ["gpt_tiny"]),
        (["steps=many"], ["steps='many'", "integer"]),
        (["batch.global=1.5"], ["batch.global=1.5"]),
        (["batch.global=8", "data.streams=5"], ["data.streams=5", "batch.global=8", "data.streams=4"]),
        (
            ["batch.global=8", "batch.micro=3", "cluster.workers=2"],
            ["batch.micro=3", "batch.global=8", "cluster.workers=2", "batch.micro=2"],
        ),
        (["batch.global=2", "cluster.workers=3"], ["cluster.workers=3", "data.streams=2"]),
        (["cluster.min_workers=3", "cluster.workers=2"], ["cluster.min_workers=3", "cluster.workers=2"]),
        (["batch.seq_len=4096"], ["batch.seq_len=4096", "model.max_len=512"]),
        (["data=text"], ["data.paths"]),
        (["optimizer.lr=1,2"], ["sweep"]),
        (["steps"], ["key=value"]),
        (["sweep=tpe"], ["'sweep=tpe'", "-m"]),
        (["sweep.trials=3"], ["-m"]),
        (["model.heads=5"], ["model.heads=5", "model.width=128"]),
        (
            ["steps=100", "profile.steps=[20,120]"],
            ["profile.steps=[20,120] names no steps of this run", "steps=100 at most, such as profile.steps=[95,100]"],
        ),
        (["steps=100", "profile.steps=[25,20]"], ["profile.steps=[25,20] names no steps", "profile.steps=[95,100]"]),
        (["steps=3", "profile.steps=[3,3]"], ["profile.steps=[3,3] names no steps", "profile.steps=[0,3]"]),
        (["profile.memory=true"], ["profile.memory says what to record", "are not given: profile.steps=[20,25]"]),
        (
            ["steps=100", "profile.steps=[2,6]", "profile.ranks=[0,2]", "cluster.workers=2"],
            ["profile.ranks=[0, 2] has rank 2, and cluster.workers=2 makes ranks 0 to 1: name one of those"],
        ),
        (["profile.steps=[5]"], ["profile.steps", "at least 2"]),
        (["profile.steps=[2,6]", "profile.ranks=[]"], ["profile.ranks", "at least 1"]),
    ],
)
def test_mistake_in_configuration_is_named_with_its_cure(overrides: list[str], expected: list[str]):
    with pytest.raises(UserError) as caught:
        configuration.load(overrides)
    assert all(words in str(caught.value) for words in expected), str(caught.value)


def test_workers_left_out_are_filled_in_once_the_cluster_is_known():
    config = configuration.load(["batch.global=8", "batch.micro=2"])
    assert config.cluster.workers is None
    filled = configuration.with_workers(config, 4)
    assert (filled.cluster.worker_count, configuration.digest(filled)) == (
        4,
        configuration.digest(configuration.load(["batch.global=8", "batch.micro=2", "cluster.workers=4"])),
    )
    assert configuration.with_workers(filled, 2) is filled
    with pytest.raises(ValueError, match=r"cluster\.workers=N"):
        _ = config.cluster.worker_count


@pytest.mark.parametrize(
    ("overrides", "workers", "expected"),
    [
        (["batch.global=8"], 16, ["has room for 16", "cluster.workers=8 or fewer, or raise batch.global"]),
        (["batch.global=8", "batch.micro=2"], 8, ["has room for 8", "batch.micro=1 or less"]),
        (["batch.global=8", "batch.micro=3"], 2, ["has room for 2", "set batch.micro=2"]),
        (["cluster.min_workers=4"], 1, ["has room for 1", "cluster.min_workers=4 is more than cluster.workers=1"]),
    ],
)
def test_batch_that_its_workers_cannot_share_is_refused_with_the_cure(overrides, workers, expected):
    with pytest.raises(UserError) as caught:
        configuration.with_workers(configuration.load(overrides), workers)
    assert all(words in str(caught.value) for words in expected), str(caught.value)


def test_variables_of_workers_are_texts_whatever_they_look_like():
    config = configuration.load(["cluster.env={NCCL_ALGO: Ring, NCCL_IB_TIMEOUT: 22, NCCL_NVLS_ENABLE: false, A: '1'}"])
    assert config.cluster.env == {"NCCL_ALGO": "Ring", "NCCL_IB_TIMEOUT": "22", "NCCL_NVLS_ENABLE": "0", "A": "1"}
    assert configuration.parse(configuration.to_dict(config)) == config


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{RANK: 1}", ["cluster.env={RANK: ...}", "cluster.workers"]),
        ("{CUDA_VISIBLE_DEVICES: 0}", ["start the command with it"]),
        ("{OMP_NUM_THREADS: 8}", ["set cluster.cpus_per_worker"]),
        ("{NCCL-ALGO: Ring}", ["NCCL-ALGO", "pattern"]),
        ("{NCCL_ALGO: [Ring]}", ["cluster.env", "string"]),
        ("Ring", ["cluster.env", "dictionary"]),
    ],
)
def test_variable_that_no_worker_can_get_is_refused(value, expected):
    with pytest.raises(UserError) as caught:
        configuration.load([f"cluster.env={value}"])
    assert all(words in str(caught.value) for words in expected), str(caught.value)


def test_several_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        configuration.load(["lerning_rate=1", "steps=many", "seed=-1", "zero=7"])
    assert all(words in str(caught.value) for words in ("4 problems", "lerning_rate", "steps", "seed", "zero=7"))


def test_config_digest_changes_with_any_value():
    digests = [
        configuration.digest(configuration.load(o)) for o in ([], ["seed=1"], ["optimizer.eps=1e-7"], ["run.name=b"])
    ]
    assert all(a != b for a, b in itertools.combinations(digests, 2))
    assert configuration.digest(configuration.load([])) == digests[0]


def test_train_help_names_every_group_and_key():
    text = configuration.help_text()
    assert all(f"{group}=" in text for group in configuration.groups())
    assert all(key in text for key in configuration.keys())  # noqa: SIM118  a function of ours


def test_sweep_with_hydra_syntax_gives_axes_and_grid():
    words = [
        "model=glob(gpt_*)",
        "optimizer.lr=choice(1e-3,3e-3)",
        "zero=0,1",
        "model.dropout=range(0,0.3,0.1)",
        "steps=8",
        "sweep.retries=2",
    ]
    sweep = configuration.load_sweep(words)
    axes = {axis.key: axis.values for axis in sweep.axes}
    assert axes["model"] == tuple(choice for choice in configuration.groups()["model"] if choice.startswith("gpt_"))
    assert axes["optimizer.lr"] == ("1e-3", "3e-3") or axes["optimizer.lr"] == ("0.001", "0.003")
    assert axes["zero"] == ("0", "1")
    assert len(axes["model.dropout"]) == 3
    assert sweep.fixed == ("steps=8",)
    assert (sweep.settings.name, sweep.settings.retries) == ("model-optimizer.lr-zero-model.dropout", 2)
    assert sweep.settings.dir == f"sweeps/{sweep.settings.name}"
    points = sweep_space.grid(sweep)
    assert len(points) == len({str(point) for point in points}) == len(axes["model"]) * 2 * 2 * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=range(1,1000000000)"], "steps=range\\(1,1000000000\\) has more than 100,000 values"),
        (["steps=range(1,1000)", "seed=range(0,1000)"], "a grid of 999,000 runs: at most 100,000"),
    ],
)
def test_sweep_without_bounds_is_refused_before_it_fills_the_memory(words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        configuration.load_sweep(words)


def test_listed_points_are_combined_with_all_axis_values(tmp_path):
    file = tmp_path / "sizes.yaml"
    file.write_text('- [model.width=32, steps=80]\n- [model.width=64, model.heads=8, "generation.prompts=[a,b]"]\n')
    sweep = configuration.load_sweep([f"sweep.points={file}", "seed=0,1", "steps=40"])
    assert sweep.settings.dir == "sweeps/sizes-seed"
    assert sweep.keys == ("model.width", "steps", "model.heads", "generation.prompts", "seed")
    small, large = (
        {"model.width": "32", "steps": "80"},
        {"model.width": "64", "model.heads": "8", "generation.prompts": "[a,b]"},
    )
    expected = [{**small, "seed": "0"}, {**small, "seed": "1"}, {**large, "seed": "0"}, {**large, "seed": "1"}]
    assert sweep_space.grid(sweep) == expected
    trial = configuration.load_trial(sweep, 3, sweep_space.grid(sweep)[3])
    assert (trial.model.width, trial.model.heads, trial.steps, trial.seed, trial.generation.prompts) == (
        64,
        8,
        40,
        1,
        ["a", "b"],
    )


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("steps: 3", [], "list of lists"),
        ("[]", [], "list of lists"),
        ("- [steps]", [], "list of lists"),
        ("- [steps=3", [], "sweep.points="),
        ("- [step=3]", [], "'steps'"),
        ("- [steps=3]\n- [steps=2, run.name=x]", [], "run.name"),
        ("- [steps=3, cluster.address=x]", [], "cluster.address"),
        ("- [steps=3]", ["steps=4,5"], "steps: given in sweep.points"),
        ("- [steps=3]", ["sweep=tpe"], "sweep=tpe chooses its own trials"),
        ("- [steps=3]\n- [steps=3, model.heads=5]", [], "model.heads=5"),
    ],
)
def test_mistake_in_listed_points_is_named(text, overrides, expected, tmp_path):
    (tmp_path / "points.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_all([f"sweep.points={tmp_path}/points.yaml", *overrides])
    assert expected in str(caught.value)


@pytest.mark.parametrize("choice", configuration.groups()["sweep"])
def test_every_shipped_sweep_choice_composes(choice: str):
    extra = {
        "grid": ["seed=1,2"],
        "nsga2": ["sweep.metric=[val_loss,tokens_per_s]", "sweep.direction=[minimize,maximize]"],
    }
    axes = ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.layers=range(1,5)"]
    sweep = configuration.load_sweep([f"sweep={choice}", *extra.get(choice, []), *([] if choice == "grid" else axes)])
    assert sweep.settings.sampler == choice
    assert choice == "grid" or (sweep.axes[0].log, sweep.axes[0].low, sweep.axes[1].high) == (True, 1e-4, 4)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["steps=8"], ["-m", "several values"]),
        (["optimizer.lr=interval(1e-4,1e-2)"], ["optimizer.lr=interval(1e-4,1e-2)", "sweep=tpe"]),
        (["optimizer.lrr=1,2"], ["'optimizer.lr'"]),
        (["model=gpt_tiny,gpt_tny"], ["gpt_tny", "gpt_tiny"]),
        (["seed=1,2", "run.name=x"], ["run.name", "sweep.name"]),
        (["seed=1,2", "run.dir=x"], ["run.dir", "sweep.name"]),
        (["cluster.address=a,b"], ["cluster.address"]),
        (["seed=1,2", "sweep.trails=3"], ["'sweep.trials'"]),
        (["seed=1,2", "sweep.trials=0"], ["sweep.trials=0"]),
        (["seed=1,2", "sweep.pruner=asha"], ["sweep.pruner=asha"]),
        (["sweep=cmaes", "optimizer.lr=interval(1e-4,1e-2)"], ["two keys"]),
        (["sweep=tpe", "seed=1,2", "eval_every=0"], ["eval_every="]),
        (["model=glob(zzz*)"], ["model=glob(zzz*)", "names nothing"]),
        (["model.heads=2,5", "model.width=64"], ["model.heads=5"]),
    ],
)
def test_mistake_in_sweep_is_named_with_its_cure(overrides: list[str], expected: list[str]):
    with pytest.raises(UserError) as caught:
        load_all(overrides)
    assert all(words in str(caught.value) for words in expected), str(caught.value)


def load_all(overrides: list[str]) -> None:
    sweep = configuration.load_sweep(overrides)
    for number, params in enumerate(sweep_space.grid(sweep)):
        configuration.load_trial(sweep, number, params)


@pytest.mark.parametrize("text", ["", "' '"])
@pytest.mark.parametrize(
    "key", ["run.dir", "data.dir", "init.from", "cluster.address", "tracking.project", "data.paths"]
)
def test_text_of_a_variable_that_is_not_set_is_refused(key: str, text: str):
    """``data.dir=$CORPUS`` without CORPUS would prepare the default, and a path of nothing is the current folder."""
    value = f"[{text or repr('')}]" if key == "data.paths" else text
    with pytest.raises(UserError, match=rf"{key}.*it is empty \(a variable that is not set\?\): say what it is"):
        configuration.load(["data=text", f"{key}={value}"])


@pytest.mark.parametrize("name", ["..", "../x", "a/../..", "/tmp/x", "", "a\x1b]0;title\x07"])
@pytest.mark.parametrize("key", ["run.name", "sweep.name"])
def test_name_that_leads_out_of_its_folder_is_refused(key: str, name: str):
    section, field = {"run.name": schema.RunConfig, "sweep.name": schema.SweepConfig}[key], "name"
    with pytest.raises(UserError, match="a folder is made by this name"):
        configuration.parse_section(section, {field: name})


@pytest.mark.parametrize(
    "key", ["optimizer.clip", "optimizer.lr", "optimizer.eps", "optimizer.weight_decay", "model.init_std"]
)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_number_that_is_not_finite_is_refused(key: str, value: str):
    with pytest.raises(UserError, match=key):
        configuration.load([f"{key}={value}"])


@given(st.floats(min_value=0), st.floats(min_value=0), st.floats())
def test_every_accepted_configuration_reaches_a_worker_unchanged(lr: float, clip: float, penalty: float):
    values = configuration.to_dict(DEFAULT)
    values["optimizer"] |= {"lr": lr, "clip": clip}
    values["generation"] |= {"length_penalty": penalty}
    try:
        config = configuration.parse(values)
    except UserError:
        assert lr == 0 or not all(map(math.isfinite, (lr, clip, penalty)))
        return
    assert schema.Config.model_validate_json(config.model_dump_json(by_alias=True)) == config


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["data.tokenizer.path=t.json"], "data.tokenizer.path=t.json is about a given tokenizer.json"),
        (["data.tokenizer.end_token='</s>'"], "add data.tokenizer.kind=file"),
        (["data.tokenizer.kind=bytes", "data.tokenizer.max_unknown=0.1"], "data.tokenizer.max_unknown=0.1"),
        (["data.tokenizer.kind=chars", "data.tokenizer.vocab_size=500"], "kind=chars learns none"),
    ],
)
def test_tokenizer_key_without_effect_is_refused(keys: list[str], words: str):
    with pytest.raises(configuration.ConfigError, match=re.escape(words)):
        configuration.load(["data=text", "data.paths=[x]", *keys])
    configuration.load(["data=text", "data.paths=[x]", "data.tokenizer.kind=bytes"])


def test_number_of_loading_processes_is_answered_by_both_keys_it_may_mean():
    both = r"cluster\.workers is how many ranks .*, and data\.workers"
    for key in ("num_workers", "data.num_workers"):
        with pytest.raises(configuration.ConfigError, match=both):
            configuration.load([f"{key}=2"])
