"""A study read from run folders: real configurations, losses of a known law; and the plan that its runs follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import run_folders
import yaml

from bench import scaling as driver
from review import scaling
from review.law import Law
from review.plan import CLUSTER, TINY, cost, trials
from review.read import read
from train import config as configuration
from train.data.tokenizer import build_tokenizer

TRUE = Law(E=0.9, A=60.0, B=800.0, alpha=0.35, beta=0.45)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the tiny plan, finished, as if the true law ruled them."""
    out = tmp_path_factory.mktemp("study") / "scaling"
    for trial in trials(TINY, str(out)):
        run = run_folders.write(out / trial.name)
        params, _ = cost(trial.config, 257)
        tokens = trial.config.steps * trial.config.batch.global_ * trial.config.batch.seq_len
        (run / "tokenizer.json").write_text(build_tokenizer(trial.config.data.tokenizer, [], ""))
        (run / "config.yaml").write_text(yaml.safe_dump(configuration.to_dict(trial.config)))
        summary = {"step": trial.config.steps, "val_loss": float(TRUE.loss(params, tokens)), "params": params, "tokens": tokens}
        (run / "summary.json").write_text(json.dumps(summary))
    return out


def test_the_largest_size_is_foretold_and_stands_beside_its_measurement(folder: Path):
    study = scaling.study([read(run) for run in sorted(folder.iterdir())])
    assert study is not None
    assert {p.n for p in study.fitted} == {21624, 35488, 70896, 171456}
    assert [guess.name for guess in study.held_out] == ["w96-1.8e12", "w96-5.4e12"]
    assert all(abs(guess.error) < 0.005 for guess in study.held_out if guess.error is not None)
    assert study.further.d * study.further.n * study.k == pytest.approx(scaling.LEAP * 5.4e12, rel=0.02)
    told = "\n".join(scaling.report(study))
    assert "w96-5.4e12 (not fitted): foretold" in told
    assert "measured" in told


def test_runs_of_one_size_unfinished_ones_and_those_of_another_corpus_are_no_study(folder: Path):
    runs = [read(run) for run in sorted(folder.iterdir())]
    assert scaling.study([run for run in runs if run.name.startswith("w48")]) is None
    for i, run in enumerate(runs):
        run.corpus = f"corpus {i // 5}"
    assert scaling.study(runs) is None
    assert scaling.study([]) is None


@pytest.mark.parametrize(("plan", "more"), [(TINY, []), (CLUSTER, ["data.paths=[a.txt]"])])
def test_every_run_of_a_plan_spends_its_budget(plan, more):
    made = list(trials(plan, "runs/s", more))
    for trial in made:
        per_token = cost(trial.config, plan.vocab_size)[1]
        spent = per_token * trial.config.steps * trial.config.batch.global_ * trial.config.batch.seq_len
        assert spent == pytest.approx(float(trial.name.split("-")[1]), rel=0.02), trial.name
        assert trial.config.schedule.final == 0.0  # it has come to rest: no run is judged before its schedule ends
    assert len({trial.name for trial in made}) == len(made)


def test_the_commands_of_a_plan_compose_to_its_configurations():
    trial = next(iter(trials(TINY, "runs/s", ["seed=3"])))
    assert configuration.load(trial.overrides) == trial.config


def test_the_driver_lists_commands_runs_nothing_twice_and_refuses_bad_keys(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert driver.main(["--list", "--out", str(folder)]) == 0
    assert capsys.readouterr().out.count("./launch.sh train experiment=scaling") == len(list(folder.iterdir()))
    assert driver.main(["--out", str(folder)]) == 0  # all complete: it would take minutes otherwise
    assert capsys.readouterr().out.count("is complete") == len(list(folder.iterdir()))
    assert driver.main(["--list", "stepz=3"]) == 2
    assert "stepz" in capsys.readouterr().err
