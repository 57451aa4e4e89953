"""The steps of ``bench gpu``: commands of the other benchmarks, at sizes for a GPU or for a CPU."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.tools import results

Row = dict[str, Any]
KINDS = ("tests", "tiles", "kernels", "steps", "saves", "restart", "repeat")
"""What is measured, in order; a kind has a step or several."""
OUT, MINUTES, SECONDS = "{out}", "{minutes}", "{seconds}"
"""In a command: the file for its rows, and the minutes or seconds after which it begins nothing more."""
MARGIN_S = 20.0
"""Seconds that a bench which ends itself may need after its minutes: for the case that it is at."""
OPS = "attention,packed_attention,cross_entropy,linear_cross_entropy,rms_norm,layer_norm,add_rms_norm,add_layer_norm"


@dataclass(frozen=True)
class Step:
    """A command that writes rows, bounded by its share of the time."""

    kind: str
    name: str
    command: tuple[str, ...]
    seconds: float
    """Its share of the time, in proportion to the others'; what a step leaves goes to those after it."""
    read: Callable[[Path], list[Row]] = results.read
    """Returns the rows of the file that it wrote."""

    def words(self, out: Path, limit_s: float) -> list[str]:
        """The command with its file and its minutes put in."""
        seconds = max(1.0, limit_s - MARGIN_S)
        values = {OUT: str(out), MINUTES: f"{seconds / 60:.2f}", SECONDS: f"{seconds:.0f}"}
        return [functools.reduce(lambda text, pair: text.replace(*pair), values.items(), word) for word in self.command]


def deadlines(steps: Sequence[Step], total_s: float) -> list[float]:
    """Seconds from the beginning by which each step ends at the latest: its share of ``total_s`` after those before."""
    sums = list(itertools.accumulate(step.seconds for step in steps))
    return [total_s * until / sums[-1] for until in sums]


def plan(gpu: bool, has_overlap: bool) -> list[Step]:
    """All steps; ``has_overlap``: whether overlap of communication can be chosen."""
    return [*(on_gpu(has_overlap) if gpu else on_cpu())]


def on_gpu(has_overlap: bool) -> Iterator[Step]:
    """The sizes of the goals, on one GPU."""
    yield tests("-m", "gpu", "-n", "4", seconds=60)
    yield Step("tiles", "tiles", python("bench.kernels", "--tiles", "--ops", OPS, "--minutes", MINUTES), 50)
    words = ("--ops", OPS, "--seconds", "0.3", "--minutes", MINUTES)
    yield Step("kernels", "kernels", python("bench.kernels", *words), 80)
    yield model_step("gpt2_124m", "1", seconds=35)
    yield model_step("llama_1b", "1", seconds=55)
    yield model_step("gpt2_124m", "1", "--timers", "on", seconds=20)
    yield model_step("gpt2_124m", "0", seconds=20)
    for stage, overlap in itertools.product("23", ("off", "on") if has_overlap else ("default",)):
        yield model_step("gpt2_124m", stage, "--overlap", overlap, seconds=20)
    words = ("--only", "stall", "--model", "auto", "--rounds", "1", "--savers", "ours,thread")
    yield Step("saves", "saves", python("bench.saves", *words), 80)
    one = ("cluster.workers=1", "cluster.device=gpu")
    yield Step("restart", "restart", python("bench.restart", "peer=false", "repeats=5", f"out={OUT}", *one), 45)
    model = ("model=gpt2_124m", "batch.global=8", "batch.seq_len=1024", "precision=bf16", "steps=6", *one)
    yield Step("repeat", "repeat", python("bench.tools.repeat", *model), 50)


def on_cpu() -> Iterator[Step]:
    """The same steps at the smallest sizes, on two cores: they show that each step works, and nothing else."""
    yield tests("-n", "0", "tests/kernels/test_pointwise.py", "-k", "bias_gelu", seconds=90)
    yield Step("tiles", "tiles", python("bench.kernels", "--tiles", "--quick", "--ops", "rms_norm"), 40)
    words = ("--quick", "--seconds", "0", "--without", "torch.compile", "--ops", OPS, "--minutes", MINUTES)
    yield Step("kernels", "kernels", python("bench.kernels", *words), 100)
    small = ("--overlap", "default", "--steps", "3", "model.vocab_size=256", "batch.global=2", "batch.seq_len=64")
    for stage, timers in (("1", "off"), ("3", "on")):
        yield model_step("gpt_tiny", stage, "--timers", timers, *small, seconds=60)
    words = ("--only", "stall", "--model", "gpt_tiny", "--rounds", "1", "--workers", "1", "--savers", "ours,thread")
    yield Step("saves", "saves", python("bench.saves", *words), 70)
    yield Step("restart", "restart", python("bench.restart", "peer=false", "repeats=1", f"out={OUT}"), 80)
    yield Step("repeat", "repeat", python("bench.tools.repeat", "steps=4"), 100)


def python(module: str, *words: str) -> tuple[str, ...]:
    """The command that runs a module of this project; its rows go to OUT, which it may also name itself."""
    out = () if any(OUT in word for word in words) else ("--out", OUT)
    return (sys.executable, "-m", module, *out, *words)


def model_step(model: str, zero: str, *words: str, seconds: float) -> Step:
    """A training step of a model, in a process of its own: one that runs out of memory leaves the rest."""
    settings = dict(zip(words[::2], words[1::2], strict=False))
    overlap, timers = settings.get("--overlap", "default"), settings.get("--timers") == "on"
    more = (f", overlap {overlap}" if overlap != "default" else "") + (", timers on" if timers else "")
    steps = () if "--steps" in words else ("--steps", "10")
    command = python("bench.mfu", "--models", model, "--zero", zero, *steps, *words)
    return Step("steps", f"step of {model}, ZeRO {zero}{more}", command, seconds)


def tests(*words: str, seconds: float) -> Step:
    """The tests, with their result in pytest's own XML."""
    quiet = ("-q", "-p", "no:cacheprovider", f"--junitxml={OUT}", f"--session-timeout={SECONDS}")
    return Step("tests", "tests", (sys.executable, "-m", "pytest", *quiet, *words), seconds, read_junit)


def read_junit(file: Path) -> list[Row]:
    """The row of a run of pytest: how many tests passed, failed and were skipped, and the names of those that failed.

    None where pytest wrote no result: it was ended, or did not begin.
    """
    try:
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return [{"bench": "tests", "passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed_tests": names}]
