"""Scaling study from run folders with losses of a known law, and the plan of its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from helpers import run_dirs

from bench import scaling as driver
from review.run_reader import read_runs
from review.scaling import study as scaling
from review.scaling.isoflop_plan import CLUSTER, TINY, IsoFlopPlan, PlannedRun, model_cost, planned_runs
from review.scaling.scaling_law import ScalingLaw
from train.config import load as configuration
from train.config import sweep_space
from train.config.schema import Config
from train.data.tokenizer import build_tokenizer

TRUE = ScalingLaw(E=0.9, A=60.0, B=800.0, alpha=0.35, beta=0.45)


def sweep_of(out: Path, plan: IsoFlopPlan = TINY, more: Sequence[str] = ()) -> list[tuple[PlannedRun, Config]]:
    """The trials of a plan, each as the sweep configures it."""
    planned = planned_runs(plan, more)
    out.mkdir(parents=True, exist_ok=True)
    (out / driver.POINTS).write_text("".join(f"- [{', '.join(trial.point)}]\n" for trial in planned))
    words = [
        *plan.overrides,
        *more,
        f"sweep.points={out / driver.POINTS}",
        f"sweep.dir={out}",
        f"sweep.name={out.name}",
    ]
    sweep = configuration.load_sweep(words)
    return [
        (trial, configuration.load_trial(sweep, i, point))
        for i, (trial, point) in enumerate(zip(planned, sweep_space.grid(sweep), strict=True))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of the tiny plan whose losses follow the law TRUE."""
    out = tmp_path_factory.mktemp("study") / "scaling"
    for i, (_, config) in enumerate(sweep_of(out)):
        run = run_dirs.write_run(out / f"{i:03}")
        params, _ = model_cost(config, 257)
        tokens = config.steps * config.batch.global_ * config.batch.seq_len
        (run / "tokenizer.json").write_text(build_tokenizer(config.data.tokenizer, [], ""))
        (run / "config.yaml").write_text(yaml.safe_dump(configuration.to_dict(config)))
        summary = {
            "step": config.steps,
            "val_loss": float(TRUE.loss(params, tokens)),
            "params": params,
            "tokens": tokens,
        }
        (run / "summary.json").write_text(json.dumps(summary))
    return out


def test_study_predicts_the_largest_size_beside_its_measurement(folder: Path):
    study = scaling.fit_study(read_runs([folder]))
    assert study is not None
    assert {p.n for p in study.fitted} == {21624, 35488, 70896, 171456}
    small, large = study.held_out
    assert (small.n, large.n) == (363168, 363168)
    assert large.d == pytest.approx(3 * small.d, rel=0.01)
    assert all(abs(guess.error) < 0.005 for guess in study.held_out if guess.error is not None)
    assert study.next_size.d * study.next_size.n * study.k == pytest.approx(
        scaling.NEXT_COMPUTE_FACTOR * 5.4e12, rel=0.02
    )
    told = "\n".join(scaling.report_lines(study))
    assert "scaling-000 (N = 363,168, D = " in told
    assert "measured" in told


def test_runs_of_one_size_or_of_many_corpora_are_no_study(folder: Path):
    runs = read_runs([folder])
    assert scaling.fit_study([run for run in runs if run.config["model.width"] == 48]) is None
    for i, run in enumerate(runs):
        run.corpus = f"corpus {i // 5}"
    assert scaling.fit_study(runs) is None
    assert scaling.fit_study([]) is None


@pytest.mark.parametrize(("plan", "more"), [(TINY, []), (CLUSTER, ["data.paths=[a.txt]"])])
def test_planned_runs_spend_their_budgets_longest_first(plan, more, tmp_path: Path):
    made = sweep_of(tmp_path / "s", plan, more)
    for trial, config in made:
        spent = model_cost(config, plan.vocab_size)[1] * config.steps * config.batch.global_ * config.batch.seq_len
        assert spent == pytest.approx(trial.compute, rel=0.02), trial.name
        assert config.schedule.final == 0.0  # it has come to rest: no run is judged before its schedule ends
    assert len({trial.name for trial, _ in made}) == len(made)
    budgets = [trial.compute for trial, _ in made]
    assert budgets == sorted(budgets, reverse=True)


def test_bench_scaling_repeats_no_run_and_refuses_bad_keys(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert driver.main(["--list", "--out", str(folder)]) == 0
    listed = capfd.readouterr().out
    assert listed.count("- [model.width=") == len(list(folder.glob("0*")))
    assert "./launch.sh train -m experiment=scaling" in listed
    assert driver.main(["--out", str(folder), "sweep.parallel=1"]) == 0  # all complete: it would take minutes otherwise
    out = capfd.readouterr().out
    assert "12 trials, grid, of model.width" in out
    assert "12 are done already" in out
    assert "not fitted): foretold" in out
    assert driver.main(["--out", str(folder), "seed=3"]) == 2  # another study's folder
    assert "holds another sweep" in capfd.readouterr().err
    assert driver.main(["--list", "stepz=3"]) == 2
    assert "stepz" in capfd.readouterr().err
