"""The one command of a GPU: whole on the CPU's path, with failing steps, and its goals on rows with known answers."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import gpu, restart
from bench.mfu import HAS_OVERLAP, Busy, Variant
from bench.saves import Room, choose_model
from bench.tools import goals, plan, results
from bench.tools.cases import BACKWARD, BOTH, FORWARD, OURS
from bench.tools.plan import OUT, Step
from train.config import load as configuration

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"device", "driver", "cudnn", "nccl", "processor", "python", "torch", "triton", "deepspeed", "commit", "date"}


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_BUILD_OPS": "0"}
    return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def script(name: str, text: str, seconds: float = 1.0, kind: str = "repeat") -> Step:
    """A step that runs a line of Python, in which OUT is the file for its rows."""
    return Step(kind, name, (sys.executable, "-c", text, OUT), seconds)


KEY = re.compile(r"(model|precision|steps|(batch|cluster)\.[a-z_]+)=.+")
WRITES = "import sys; open(sys.argv[1], 'w').write('{\"equal\": true}\\n')"


def run_steps(folder: Path, steps: list[Step], minutes: float = 5.0) -> tuple[int, list[dict], list[dict]]:
    """Exit code of the command with these steps, the rows about the steps, and the rows that the steps wrote."""
    file = folder / "rows.jsonl"
    code = gpu.main(["--out", str(file), "--logs", str(folder / "logs"), "--minutes", str(minutes)], steps)
    rows = results.read(file)
    about = [row for row in rows if row.get("bench") == "gpu"]
    return code, about, [row for row in rows if row not in about]


def table_of(shown: str) -> list[list[str]]:
    """The cells of the table of goals."""
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    return [re.split(r"\s*│\s*", line)[1:-1] for line in lines]


@pytest.mark.timeout(600)
def test_the_whole_command_runs_on_a_cpu(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    done = command(sys.executable, "-m", "bench.gpu", "--out", str(out), "--logs", str(tmp_path / "logs"))
    rows = results.read(out)
    about = [row for row in rows if row["bench"] == "gpu"]
    assert done.returncode == 0, [row for row in about if row["outcome"] != gpu.DONE]
    assert list(dict.fromkeys(row["kind"] for row in about)) == list(plan.KINDS)
    assert all(row["outcome"] == gpu.DONE and row["seconds"] <= row["limit_s"] for row in about)
    assert all(row.keys() >= MACHINE and row["device"] == "cpu" and row["driver"] is None for row in rows)
    assert {row["run"] for row in rows} == {about[0]["run"]}
    made: dict[str, list[dict]] = {}
    for row in rows:
        made.setdefault(row["bench"], []).append(row)
    assert made["tests"][0]["passed"] > 0
    assert {row["op"] for row in made["kernels"] if "op" in row} == set(plan.OPS.split(","))
    assert [(row["zero"], row["timers"]) for row in made["mfu"]] == [(1, False), (3, True)]
    assert all(row["ms"] > 0 and row["idle_ms"] is None and row["peak_bytes"] is None for row in made["mfu"])
    assert {row["saver"] for row in made["saves"]} == {"ours", "async_save, thread"}
    assert made["restart"][0]["recoveries"][0]["train"] > 0
    assert made["repeat"][0]["equal"]
    table = table_of(done.stdout)
    assert len(table) > 25
    assert all(found == "" and verdict == "not measured" for _, _, found, _, verdict, _ in table)


def test_steps_that_fail_or_take_too_long_leave_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [
        script("broken", "raise SystemExit('no room')"),
        script("good", WRITES),
        script("silent", "pass"),
        script("missed", WRITES + f"; sys.exit({goals.MISSED})"),
    ]
    code, about, made = run_steps(tmp_path, steps)
    assert code == 1
    outcomes = {row["step"]: (row["outcome"], row["code"]) for row in about}
    assert outcomes == {
        "broken": (gpu.FAILED, 1),
        "good": (gpu.DONE, 0),
        "silent": (gpu.FAILED, 0),
        "missed": (gpu.DONE, goals.MISSED),
    }
    assert about[0]["reason"] == "exit code 1: no room"
    assert [(row["step"], row["equal"], row["device"]) for row in made] == [
        ("good", True, "cpu"),
        ("missed", True, "cpu"),
    ]
    shown = capsys.readouterr().out
    assert "failed in" in shown
    assert "no room" in shown
    assert all(found == "" for _, _, found, *_ in table_of(shown))


LINGERS = """
import os, pathlib, subprocess, sys, time
pids, role = pathlib.Path(sys.argv[2]), sys.argv[3]
if role == "lingers":
    with pids.open("a") as file:
        file.write(f"{os.getpid()} ")
    time.sleep(600)
script, out = sys.argv[0], sys.argv[1]
subprocess.Popen([sys.executable, script, out, pids, "lingers"], start_new_session=True)
pathlib.Path(out).write_text('{"equal": true}\\n')
while len(pids.read_text().split() if pids.exists() else []) < int(sys.argv[4]):
    time.sleep(0.05)
if role == "stays":
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)
"""
"""A command that starts a process in a session of its own, which outlives it; "stays" does not end by itself."""


def test_no_process_of_a_step_is_left(tmp_path: Path):
    """Neither of one that is ended at its time limit and ignores SIGINT, nor of one that ends and leaves an orphan."""
    (tmp_path / "lingers.py").write_text(LINGERS)
    pids = tmp_path / "pids"
    words = (sys.executable, str(tmp_path / "lingers.py"), OUT, str(pids))
    steps = [Step("repeat", "stays", (*words, "stays", "1"), 12), Step("repeat", "ends", (*words, "ends", "2"), 60)]
    code, about, made = run_steps(tmp_path, steps, minutes=72 / 60)
    assert code == 1
    assert [row["outcome"] for row in about] == [gpu.TOO_LONG, gpu.DONE]
    assert about[0]["reason"] == "not done after 12 s, and ended"
    assert [row["step"] for row in made] == ["stays", "ends"]  # what was written until then is kept
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    assert not [pid for pid in started if psutil.pid_exists(pid)]


def test_ctrl_c_ends_all_and_keeps_the_rows(tmp_path: Path):
    pid_file, out = tmp_path / "pid", tmp_path / "rows.jsonl"
    waits = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parts = (("good", WRITES), ("waits", waits), ("never", WRITES))
    steps = ", ".join(
        f"Step('repeat', {name!r}, (sys.executable, '-c', {text!r}, '{OUT}'), 60.0)" for name, text in parts
    )
    main = f"gpu.main(['--out', {str(out)!r}, '--logs', {str(tmp_path / 'logs')!r}], [{steps}])"
    text = f"import sys; from bench import gpu; from bench.tools.plan import Step; sys.exit({main})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not psutil.pid_exists(int(pid_file.read_text()))
    about = [row for row in results.read(out) if row.get("bench") == "gpu"]
    assert [row["outcome"] for row in about] == [gpu.DONE, gpu.INTERRUPTED, gpu.NOT_BEGUN]
    assert "goals of one GPU" in shown


def test_a_step_gets_what_those_before_it_left():
    steps = [script(str(n), "", seconds) for n, seconds in enumerate((10.0, 30.0, 20.0))]
    assert plan.deadlines(steps, 120.0) == [20.0, 80.0, 120.0]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_plan_of_a_gpu_is_in_order(overlap: bool):
    steps = plan.plan(True, overlap)
    assert [kind for kind, _ in itertools.groupby(steps, lambda step: step.kind)] == list(plan.KINDS)
    assert len({step.name for step in steps}) == len(steps)
    words = {step.name: " ".join(step.words(Path("/rows"), 80.0)) for step in steps}
    assert "--minutes 1.00" in words["kernels"]
    assert all("/rows" in text for text in words.values())
    assert ("step of gpt2_124m, ZeRO 3, overlap on" in words) == overlap


def options_of(steps: list[Step]) -> set[str]:
    return {word for step in steps for word in step.command if word.startswith("--")}


def test_a_gpus_commands_have_no_word_that_a_cpu_did_not_try():
    """Their options are those of the plan that the whole command was run with; their keys and variants exist."""
    steps = plan.plan(True, HAS_OVERLAP)
    assert options_of(steps) <= options_of(plan.plan(False, HAS_OVERLAP))
    for step in steps:
        configuration.load([*restart.FIXED, *filter(KEY.fullmatch, step.command)])
        if step.kind == "steps":
            given = dict(itertools.pairwise(step.command))
            variant = Variant(given["--models"], int(given["--zero"]), given.get("--overlap", "default"), False)
            assert variant.settings([]).zero.stage == variant.zero
            assert f"step of {variant}" == step.name.removesuffix(", timers on")


def test_no_unknown_step_is_taken(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,kernel"])
    assert "no step kernel; there are tests, tiles" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the goals


def kernel_row(variant: str, ms: float, mode: str = BOTH, **more: Any) -> dict[str, Any]:
    row = {"op": "attention", "shape": "s", "mode": mode, "variant": variant, "device": "H", "dtype": "bfloat16"}
    return row | ({"rounds": [ms] * 3} if ms else {}) | more


def verdicts(rows: dict[str, list[dict]], why: str = "why") -> dict[tuple[str, str], goals.Verdict]:
    found = goals.verdicts(rows, dict.fromkeys(plan.KINDS, why))
    return {(verdict.id, verdict.what): verdict for verdict in found}


def test_goals_of_the_kernels_take_the_worst_shape():
    rows = [kernel_row(OURS, 1.0), kernel_row("sdpa flash", 2.0), kernel_row("sdpa cudnn", 0.5)]
    rows += [kernel_row(OURS, 1.0, shape="t"), kernel_row("sdpa flash", 1.2, shape="t")]
    rows += [kernel_row("sdpa cudnn", 0.0, FORWARD, failed="no cuDNN")]
    found = verdicts({"kernels": rows})
    flash = found["P1", f"attention: speed / sdpa flash, {BOTH}"]
    assert (flash.found, flash.reached, flash.why) == ("1.20", False, "at 1 of 2 shapes; worst: attention t")
    assert found["P1", f"attention: speed / best sdpa, {BOTH}"].found == "0.50"
    assert found["P1", f"attention: speed / sdpa cudnn, {FORWARD}"][-2:] == (None, "no cuDNN")
    assert found["P5", f"add and norm: speed / liger, {BOTH}"][2:] == ("", ">= 1.4", None, "why")
    assert found["P4", f"norms: speed / torch.compile, {BACKWARD}"].reached is None


PRODUCTS, SHEET = "MFU of measured products", "MFU of the data sheet"
FIGURES = [
    (
        "steps",
        {"model": "gpt2_124m", "mfu": 0.51, "mfu_spec": None},
        f"gpt2_124m: {PRODUCTS}",
        "0.51",
        True,
    ),
    ("steps", {"model": "llama_1b", "mfu": 0.49, "mfu_spec": 0.4}, f"llama_1b: {PRODUCTS}", "0.49", False),
    ("steps", {"model": "llama_1b", "mfu": 0.7, "mfu_spec": 0.6}, f"llama_1b: {SHEET}", "0.6", True),
    ("steps", {"model": "llama_1b", "failed": "out of memory"}, f"llama_1b: {SHEET}", "", None),
    ("saves", {"saver": "ours", "stall_s": [0.2, 0.04, 0.01]}, "stall of a save, seconds", "0.04", True),
    ("saves", {"saver": "ours", "stall_s": [0.2]}, "stall of a save / async_save's", "", None),
    ("restart", {"recoveries": [{"train": 1.5}, {"train": 0.5}]}, "SIGKILL to the next step: worst s", "1.5", True),
    ("restart", {"recoveries": [{"train": 1.5}, {"train": 0.9}]}, "SIGKILL to the next step: median s", "1.2", False),
    ("repeat", {"equal": False}, "two equal runs, bit for bit: 1 is yes", "0", False),
]


@pytest.mark.parametrize(("step", "row", "what", "found", "reached"), FIGURES)
def test_goals_of_steps_are_judged_by_rows_of_a_gpu_only(
    step: str, row: dict, what: str, found: str, reached: bool | None
):
    on_gpu = {key[1]: verdict for key, verdict in verdicts({step: [row | {"device": "H"}]}).items()}[what]
    assert (on_gpu.found, on_gpu.reached) == (found, reached)
    assert on_gpu.why == ("" if found else "why")
    for device in ({"device": "cpu"}, {}):
        other = {key[1]: verdict for key, verdict in verdicts({step: [row | device]}).items()}[what]
        assert (other.found, other.reached, other.why) == ("", None, "why")


def test_every_goal_that_was_not_measured_has_a_reason():
    failed = gpu.Outcome(gpu.FAILED, "exit code 1: no", 9.0)
    why = gpu.why_not([("saves", failed), ("steps", gpu.Outcome(gpu.DONE, "", 9.0))], "H100")
    assert why["saves"] == "failed: exit code 1: no"
    assert why["steps"].startswith("no row has it")
    assert why["restart"] == "not among the steps of this run"
    assert set(gpu.why_not([("saves", failed)], "cpu").values()) == {"no GPU here"}


def test_pytests_result_is_read_from_its_xml(tmp_path: Path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    xml = tmp_path / "out.xml"
    done = command(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--junitxml={xml}", str(tmp_path))
    assert done.returncode == 1
    (row,) = plan.read_junit(xml)
    assert (row["passed"], row["skipped"], row["failed_tests"]) == (1, 1, ["test_a::test_b"])
    assert plan.read_junit(tmp_path / "none.xml") == []


# ---------------------------------------------------------------------------------------------------- the measurements


@pytest.mark.parametrize(
    ("intervals", "total", "longest"),
    [
        ([], 0, 0),
        ([(5, 9)], 4, 0),
        ([(0, 10), (12, 15), (20, 21)], 14, 5),
        ([(12, 15), (0, 10)], 13, 2),
        ([(0, 10), (2, 4), (8, 12), (12, 13)], 13, 0),
    ],
)
def test_busy_time_counts_overlapping_kernels_once(intervals: list, total: int, longest: int):
    assert Busy.of(intervals) == Busy(total, longest)


@pytest.mark.parametrize(
    ("room", "holds"),
    [
        (Room(gpu=141 << 30, host=128 << 30, disk=500 << 30), True),
        (Room(gpu=40 << 30, host=128 << 30, disk=500 << 30), False),
        (Room(gpu=141 << 30, host=32 << 30, disk=500 << 30), False),
        (Room(gpu=141 << 30, host=128 << 30, disk=40 << 30), False),
    ],
)
def test_a_model_is_saved_where_gpu_host_and_disk_have_room(room: Room, holds: bool):
    assert choose_model(room) == ("llama_1b" if holds else "gpt2_124m")


def test_rows_are_whole_lines(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"a": 1}) + "\n" + '{"a": 2')
    assert results.read(file) == [{"a": 1}]
    assert results.read(tmp_path / "none") == []
