"""Secrets in the environment, in overrides and in URLs are in no file that a job writes and in none of its output."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from train.config import load as configuration
from train.run_dir import resume

REPOSITORY = Path(__file__).resolve().parents[3]
TESTS = REPOSITORY / "tests"
SECRETS = {"WANDB_API_KEY": "CANARY" + "0" * 34, "DB_PASSWORD": "CANARY-IN-THE-ENVIRONMENT"}


def run_command(tmp_path, *words, **env):
    """Runs a command: its exit code and its output, which is also kept in a file for the search."""
    done = subprocess.run(
        [*map(str, words)],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}", "OMP_NUM_THREADS": "1", **SECRETS, **env},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    with (tmp_path / "said").open("a") as file:
        file.write(done.stdout)
    return done.returncode, done.stdout


def files_with_secrets(folder):
    """The files that hold a secret. Compressed files are not searched, and there are none here."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and b"CANARY" in path.read_bytes()]


def test_secrets_are_in_nothing_that_jobs_write_or_say(corpus, as_typed, tmp_path):
    url = "s3://key:CANARY-IN-A-URL@bucket"
    shutil.copytree(corpus.parent / "text", tmp_path / "text")
    train = [sys.executable, "-m", "cluster", "train"]
    settings = [
        "cluster.workers=2",
        "tracking.wandb=offline",
        "data.paths=[text]",
        f"cluster.env={{STORE: '{url}'}}",
        "data.dir=null",
        "generation.prompts=[a]",
    ]
    code, said = run_command(tmp_path, *train, *as_typed(*settings, "steps=4"))
    assert code == 0, said
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert "s3://[hidden]@bucket" in (tmp_path / "run" / "config.yaml").read_text()
    assert resume.check_resumable(configuration.load(as_typed(*settings, "steps=4")), None) == []

    code, said = run_command(tmp_path, *train, *as_typed(*settings, "tracking.key=CANARY-IN-AN-OVERRIDE", name="b"))
    assert (code, "unknown key 'tracking.key'" in said) == (2, True)
    code, said = run_command(tmp_path, *train, *as_typed(*settings, "data.paths=['s3://k:CANARY@nowhere']", name="c"))
    assert (code, "data.paths has 1 URL with a password" in said) == (2, True)

    fault = {"rank": 1, "step": 2, "do": "raise", "say": f"cannot read {url} with {SECRETS['DB_PASSWORD']}"}
    code, said = run_command(
        tmp_path, sys.executable, TESTS / "helpers/drive.py", tmp_path / "crashed", json.dumps(fault)
    )
    assert code == 1
    assert "cannot read s3://[hidden]@bucket with [hidden]" in said
    assert "[hidden]" in (tmp_path / "crashed" / "logs" / "rank_1.log").read_text()

    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) > 50
    assert files_with_secrets(tmp_path) == []
