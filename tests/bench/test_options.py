"""Options of the measurements: refused before minutes are spent on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gloo_ranks

from bench import collectives, faults, restart, scale
from bench.tools.options import parse_options
from train.errors import UserError

MEASUREMENTS = {
    "faults": (faults.OPTIONS, [*restart.FIXED, "tracking=off"]),
    "restart": (restart.OPTIONS, restart.FIXED),
    "scale": (scale.OPTIONS, scale.FIXED),
    "collectives": (collectives.OPTIONS, None),
}


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("faults", "minutes=abc"),
        ("faults", "minutes=nan"),
        ("faults", "minutes=inf"),
        ("faults", "every=0"),
        ("faults", "victims=driver"),
        ("faults", "peer=yes"),
        ("faults", "peer"),
        ("faults", "seed=1.5"),
        ("restart", "repeats=0"),
        ("restart", "peer=False"),
        ("scale", "ranks=8,0"),
        ("scale", "ranks="),
        ("scale", "faults=-1"),
        ("scale", "work_s=-1"),
        ("collectives", "check=yes"),
        ("collectives", "steps=3"),
    ],
)
def test_option_of_another_kind_is_refused_by_name(name: str, word: str):
    options, fixed = MEASUREMENTS[name]
    with pytest.raises(UserError, match=f"(?m)^{word}( |:)"):
        parse_options([word], options, fixed)


def test_options_have_their_usual_values_type_and_the_rest_is_checked(tmp_path: Path):
    out = tmp_path / "new" / "rows.jsonl"
    values, overrides = parse_options(
        ["every=5", "peer=false", f"out={out}", "model=llama_tiny"], *MEASUREMENTS["faults"]
    )
    assert (values["every"], values["peer"], values["minutes"], values["victims"]) == (5.0, False, 10.0, "all")
    assert out.exists()
    assert overrides == [*restart.FIXED, "tracking=off", "model=llama_tiny"]
    assert parse_options(["ranks=8,64"], scale.OPTIONS, scale.FIXED)[0]["ranks"] == (8, 64)
    with pytest.raises(UserError, match="minuts"):
        parse_options(["minuts=3"], *MEASUREMENTS["faults"])


def test_bench_ends_with_2_for_a_file_that_takes_no_results(tmp_path: Path):
    (tmp_path / "file").touch()
    words = ["scale", "ranks=8", f"out={tmp_path}/file/rows.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.tools.run", *words], cwd=gloo_ranks.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr
