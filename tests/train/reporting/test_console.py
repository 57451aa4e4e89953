"""Lines of the console, on a terminal and in a file, from the events that it is given."""

import io
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from train.reporting.console import RunConsole
from train.reporting.terminal import UserConsole
from train.util.format import count, duration

CONFIG = {
    "run": {"name": "gpt_mini-stdlib", "dir": "runs/x"},
    "steps": 1000,
    "cluster": {"workers": 2, "cpus_per_worker": 1},
    "zero": {"stage": 2},
    "precision": {"name": "fp32"},
    "model": {"layers": 4, "width": 256, "heads": 4},
    "batch": {"global": 16, "seq_len": 256},
}
LIFE = [
    {"event": "job", "config": CONFIG, "device": "cpu", "hosts": 1},
    {"event": "phase", "name": "engine", "t": 1.0},
    {"event": "plan", "params": 4_200_000, "tokens": 4_096_000, "steps": 1000, "start_step": 0},
    {"event": "step", "step": 10, "steps": 1000, "loss": 6.5, "tokens_per_s": 12345.0},
    {"event": "eval", "step": 200, "val_loss": 3.5, "bits_per_byte": 2.1},
    {"event": "eval", "step": 400, "val_loss": 3.25, "bits_per_byte": 1.9},
    {"event": "save", "step": 400, "path": "runs/x/checkpoints/step_400", "seconds": 0.41},
    {"event": "note", "text": "W&B is offline"},
    {"event": "sample", "step": 1000, "prompt": "def ", "text": "main():\n    pass [not markup]"},
    {"event": "done", "summary": {"step": 1000, "val_loss": 3.25, "wall_s": 331.0, "tokens": 4_096_000}},
]


def shown(events, terminal=False, width=100):
    out, errors = io.StringIO(), io.StringIO()
    console = RunConsole(
        UserConsole(file=out, force_terminal=terminal, width=width, highlight=False),
        UserConsole(file=errors, force_terminal=terminal, width=width, highlight=False, soft_wrap=True),
    )
    for event in events:
        console.show(event)
    console.close()
    return out.getvalue(), errors.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_console_shows_all_events_of_a_run(terminal):
    text, errors = shown(LIFE, terminal)
    for words in (
        "gpt_mini-stdlib",
        "ZeRO stage 2",
        "4.2M parameters",
        "16 x 256 tokens",
        "validation loss",
        "3.2500",
        "-0.2500",
        "1.9000 bits per byte",
        "W&B is offline",
        "[not markup]",
        "5 min 31 s",
    ):
        assert words in text
    assert errors == ""


def test_console_into_a_file_writes_no_control_characters():
    text, _ = shown(LIFE)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "step 10/1,000  loss 6.5000  12.3k tokens/s" in text


ON_GPUS = {"tokens_per_s": 84300.0, "tokens_per_s_per_worker": 10540.0, "mfu": 0.4123, "gpu_peak_gib": 61.37}


@pytest.mark.parametrize(
    ("width", "seen", "unseen"),
    [
        (140, ["step 20/1,000", "loss 6.4000", "84.3k tokens/s", "MFU 41.2%", "61.4 GiB", "10.5k a GPU", "left"], []),
        (80, ["step 20/1,000", "loss 6.4000", "84.3k tokens/s", "MFU 41.2%", "left"], ["61.4 GiB", "10.5k a GPU"]),
        (60, ["step 20/1,000", "loss 6.4000", "left"], ["tokens/s", "MFU"]),
    ],
)
def test_live_line_keeps_to_one_row_of_a_narrow_terminal(width, seen, unseen, monkeypatch):
    monkeypatch.setattr("train.reporting.console.time.monotonic", itertools.count(0.0, 10.0).__next__)
    steps = [{"event": "step", "step": n, "steps": 1000, "loss": 6.4} | ON_GPUS for n in (10, 20)]
    text, _ = shown([LIFE[0], *steps], terminal=True, width=width)
    [line] = [line for line in text.replace("\r", "\n").splitlines() if "step 20/" in line]
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
    assert len(plain) <= width
    assert [words for words in [*seen, *unseen] if words in plain] == seen


def test_head_says_device_rates_and_precision_with_its_reason():
    device = {"device": "NVIDIA H200", "peak_flops": 989e12, "measured_flops": 7.13e14}
    plan = {"event": "plan", "precision": "bf16", "precision_why": "auto: every worker's device has it"} | device
    text, _ = shown([LIFE[0], plan], width=200)
    rates = "989 TFLOP/s by its data sheet, 713 TFLOP/s measured in matrix products"
    assert f"device   NVIDIA H200; bf16 (auto: every worker's device has it); {rates}" in text
    text, _ = shown([LIFE[0], plan | {"peak_flops": None, "measured_flops": 2.9e10}], width=200)
    assert "device has it); 29 GFLOP/s measured" in text


def test_end_says_speed_and_step_times():
    summary = LIFE[-1]["summary"] | ON_GPUS | {"step_s_p50": 0.4012, "step_s_p99": 0.6}
    text, _ = shown([{"event": "done", "summary": summary}], width=200)
    assert "84.3k tokens/s · MFU 41.2% · 61.4 GiB · 10.5k a GPU · a step 0.401 s · 99 % of steps within 0.6 s" in text


def test_console_hides_samples_before_the_last_step():
    for terminal in (True, False):
        text, _ = shown([LIFE[0], {"event": "sample", "step": 400, "prompt": "def ", "text": "early"}], terminal)
        assert "early" not in text


def test_live_line_between_logged_steps_keeps_the_last_loss():
    steps = [{"event": "step", "step": 10, "steps": 1000, "loss": 6.5}, {"event": "step", "step": 11, "steps": 1000}]
    text, _ = shown([LIFE[0], *steps], terminal=True)
    assert "loss 6.5000" in text.split("step 11/")[-1]


def test_console_into_a_file_skips_steps_without_a_loss():
    text, _ = shown([{"event": "step", "step": 3, "steps": 1000}])
    assert text == ""


def test_console_for_a_complete_run_says_how_to_train_it_further():
    out = io.StringIO()
    console = RunConsole(UserConsole(file=out, width=200, highlight=False))
    console.complete(
        SimpleNamespace(run=SimpleNamespace(dir="runs/x"), objective=SimpleNamespace(name="causal")),
        LIFE[-1]["summary"],
    )
    text = out.getvalue()
    for words in ("validation loss 3.25", "complete already", "steps=...", "run.name=..."):
        assert words in text


def test_console_into_a_file_shows_progress_seldom_and_the_last_step():
    steps = [{"event": "step", "step": n, "steps": 1000, "loss": 1.0} for n in range(1, 1001)]
    text, _ = shown(steps)
    lines = [line for line in text.splitlines() if "step" in line]
    assert len(lines) == 2
    assert "1,000/1,000" in lines[-1]


@pytest.mark.parametrize(
    "kind",
    [
        "job",
        "plan",
        "phase",
        "prepare",
        "step",
        "eval",
        "save",
        "sample",
        "note",
        "done",
        "failure",
        "stopping",
        "unheard of",
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_console_survives_events_without_fields(kind, terminal):
    shown([{"event": kind}, {}], terminal)


def test_failure_is_one_block_on_stderr_with_the_next_action():
    lines = ["rank 1 on oar (pid 7) killed by SIGKILL", "", "the last lines of its log:", "  step 12"]
    out, errors = shown([LIFE[0], {"event": "failure", "lines": lines, "next": None}])
    assert errors.splitlines()[0] == "FAILED: rank 1 on oar (pid 7) killed by SIGKILL"
    assert "  step 12" in errors
    assert "runs/x/logs/" in errors
    assert "run the same command again" in errors
    assert "SIGKILL" not in out


def test_end_of_a_run_names_its_folder_and_the_next_commands():
    out = io.StringIO()
    console = RunConsole(UserConsole(file=out, width=60))
    config = SimpleNamespace(run=SimpleNamespace(dir="runs/x"), objective=SimpleNamespace(name="causal"))
    console.finished(config)
    console.startup(
        {"config": 0.5, "ray": 2.0, "workers": 2.4, "imports": 4.1, "first_step": 5.0, "first_step_done": 5.5}
    )
    console.stopped(config)
    text = out.getvalue()
    assert './launch.sh generate run.dir=runs/x prompt="..."' in text
    assert "./launch.sh evaluate run.dir=runs/x" in text
    assert "Ray up 2.0" in text
    assert "first step 5.5" in text
    assert "Run the same command again to go on" in text


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (950, "950"),
        (12_345, "12.3k"),
        (124_439_808, "124M"),
        (1.5e9, "1.5B"),
        (2e12, "2T"),
        (None, "?"),
        (float("nan"), "?"),
    ],
)
def test_count_shortens_large_numbers(number, words):
    assert count(number) == words


@pytest.mark.parametrize(("seconds", "words"), [(7.6, "8 s"), (125, "2 min 05 s"), (11400, "3 h 10 min")])
def test_duration_uses_the_two_largest_units(seconds, words):
    assert duration(seconds) == words


def test_console_and_driver_import_no_torch():
    code = "import sys, cluster.driver.train_driver, train.reporting.console; "
    code += "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], check=True)


def test_failure_with_a_restart_says_so_and_recovery_is_one_line():
    next_ = "starting again from the checkpoint of step 40 (restart 1 of 3 without progress)"
    marks = {
        "failed": 100.0,
        "ended": 100.1,
        "start": 100.2,
        "connected": 100.3,
        "engine": 100.5,
        "first_step": 100.8,
        "train": 101.0,
    }
    failure = {"event": "failure", "lines": ["rank 1 killed by SIGKILL"], "next": next_, "again": True}
    out, errors = shown([LIFE[0], failure, {"event": "recovered", "workers": 2, **marks}])
    assert f"Next: {next_}" in errors
    assert "run the same command" not in errors
    assert "recovered in 1.0 s with 2 workers: noticed and ended 0.1 · workers started 0.2 · met 0.3" in out


def test_end_of_a_classifier_suggests_no_generate_command():
    out = io.StringIO()
    config = SimpleNamespace(run=SimpleNamespace(dir="runs/x"), objective=SimpleNamespace(name="classify"))
    RunConsole(UserConsole(file=out, width=60)).finished(config)
    assert "generate" not in out.getvalue()
    assert "next     ./launch.sh evaluate run.dir=runs/x" in out.getvalue()


def test_next_commands_quote_a_run_name_with_a_space():
    out = io.StringIO()
    config = SimpleNamespace(run=SimpleNamespace(dir="runs/my run"), objective=SimpleNamespace(name="causal"))
    RunConsole(UserConsole(file=out, width=200)).finished(config)
    assert "./launch.sh generate 'run.dir=runs/my run' prompt=" in out.getvalue()
    assert "./launch.sh evaluate 'run.dir=runs/my run'" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_console_shows_text_of_users_as_it_is(terminal):
    config = CONFIG | {"run": {"name": "a[/v2][red]:tada:", "dir": "runs/e[v3]"}}
    sample = {"event": "sample", "step": 1000, "prompt": "[b]", "text": "\x1b]0;title\x07 \x9b2J \u202e [/]"}
    text, _ = shown([{"event": "job", "config": config, "device": "cpu", "hosts": 1}, sample], terminal)
    for words in ("a[/v2][red]:tada:", "runs/e[v3]", "[b]", "\\x1b]0;title", "\\x9b2J", "\\u202e"):
        assert words in text
    assert not {"\x1b]", "\x9b", "\u202e"} & {text[n : n + k] for n in range(len(text)) for k in (1, 2)}


@pytest.mark.parametrize("event", ["note", "failure"])
def test_console_obeys_no_escape_sequence_of_a_message(event):
    words = "x\x1b[2J\udcff.txt"
    out, errors = shown([{"event": event, "text": words, "lines": [words]}])
    assert "x\\x1b[2J\\xff.txt" in out + errors


def test_terminal_without_a_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text, _ = shown(LIFE, terminal=True)
    assert "step 10/1,000  loss 6.5000" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [1, 2, 5, 20])
def test_console_survives_a_terminal_of_few_columns(width):
    text, _ = shown(LIFE, terminal=True, width=width)
    assert text
