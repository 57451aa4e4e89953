"""No verb imports a file of the folder that it is called in: only the product and its environment run."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gloo_ranks

TRAP = """import pathlib
with (pathlib.Path(__file__).parent / "IMPORTED").open("a") as file:
    file.write(__name__ + chr(10))
raise SystemExit("a file of the working folder was imported: " + __file__)
"""
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n"
RUN = ["experiment=gpt_tiny", "data=text", "data.paths=[b.txt]", "data.tokenizer.kind=bytes", "tracking=off"]
TRAIN = [*RUN, "steps=2", "log_every=1", "zero=2", "cluster.workers=2", "generation.max_tokens=4"]
VERBS = {
    "prepare": ["prepare", *RUN],
    "train": ["train", *TRAIN, "run.name=r"],
    "sweep": ["train", "-m", *TRAIN, "seed=1,2", "sweep.name=s"],
    "evaluate": ["evaluate", "run.dir=runs/r"],
    "generate": ["generate", "run.dir=runs/r", "prompt=The dog", "max_tokens=8"],
    "trace": ["trace", "run.dir=runs/r", "step=1"],
    "export": ["export", "run.dir=runs/r", "to=exported"],
    "review": ["review", "runs/r", "--out", "page"],
    "bench": ["bench", "loader", "--help"],
    "drill": ["drill", "--help"],
}
"""One call of each verb that does its work in the folder, in an order in which each finds what it needs."""


def top_level_modules() -> set[str]:
    """Names of all modules that an ``import`` of the product, its environment or the standard library may mean."""
    product = {path.stem for path in gloo_ranks.REPOSITORY.iterdir() if path.is_dir() or path.suffix == ".py"}
    names = product | set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    return {name for name in names if name.isidentifier()}


def names_of_other_files(folder: Path) -> set[str]:
    """The names of the files and folders in ``folder`` that are no traps."""
    return {path.name for path in folder.iterdir() if path.suffix != ".py"}


def call_verbs(folder: Path, pythonpath: str = "") -> dict[str, subprocess.CompletedProcess]:
    """The outcome of every verb, called in ``folder``, which gets a text to train on."""
    (folder / "b.txt").write_text(TEXT * 300)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": pythonpath}
    environment.pop("PYTHONSAFEPATH", None)
    launch = str(gloo_ranks.REPOSITORY / "launch.sh")
    outcomes = {}
    for name, words in VERBS.items():
        outcomes[name] = subprocess.run(
            [launch, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
    return outcomes


@pytest.mark.timeout(900)
def test_verbs_in_folder_of_module_names_do_as_in_empty_folder(tmp_path: Path):
    (empty := tmp_path / "empty").mkdir()
    (full := tmp_path / "full").mkdir()
    for name in top_level_modules():
        (full / f"{name}.py").write_text(TRAP)
    expected, outcomes = call_verbs(empty), call_verbs(full, pythonpath=":relative:")
    for name, outcome in outcomes.items():
        assert outcome.returncode == expected[name].returncode == 0, f"{name}: {outcome.stdout}{outcome.stderr}"
    imported = full / "IMPORTED"
    assert not imported.exists(), imported.read_text()
    for name in ("evaluate", "generate", "bench"):
        assert outcomes[name].stdout == expected[name].stdout
    assert names_of_other_files(full) == names_of_other_files(empty)
