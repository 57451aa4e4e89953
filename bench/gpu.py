"""All that one GPU can show, by one command in under nine minutes: tests, speed, and which goals it reaches.

    ./launch.sh bench gpu [--only tests,kernels,...] [--minutes 8.5] [--out FILE] [--logs FOLDER]

In this order:

    tests    the tests that need a GPU
    tiles    tile sizes of the Triton kernels, measured and kept on this machine
    kernels  attention, norms and losses beside torch's backends, torch.compile, FlexAttention and Liger-Kernel
    steps    a training step of gpt2_124m and llama_1b: time by part, MFU, memory, how long the device is idle; at ZeRO
             0 to 3, with and without overlap, and with DeepSpeed's timers
    saves    how long a save of llama_1b's state holds up training (of gpt2_124m where there is no room)
    restart  a job of ./launch.sh train, its worker killed by SIGKILL: seconds to the next step
    repeat   two runs of one configuration: equal bit for bit or not

Each step is a command in processes of its own, the same that `./launch.sh bench NAME` runs. It has a share of the
minutes, with what the steps before it left of theirs, and is ended when they are over. A step that fails or is ended is
a row with the reason, and the next one begins. Ctrl-C ends all processes and keeps the rows. Rows go to
bench/results/gpu.jsonl as soon as a step has ended, with device, driver, versions and commit; the output of each step
to a folder of logs. Last comes a table of the goals of one GPU: reached, missed, or not measured and why.

Without a GPU the same steps run at the smallest sizes on the CPU, in some two minutes. Their rows have the device
"cpu", and count for no goal.

Exit code: 0 if every step was done, also where goals were missed; 1 if one was not; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.tools import bounded, goals, results
from bench.tools.plan import KINDS, Step, deadlines, plan
from train.config.schema import ZeroConfig
from train.errors import ExitCode

Row = dict[str, Any]
DONE, FAILED, TOO_LONG, NOT_BEGUN, INTERRUPTED = "done", "failed", "too long", "not begun", "interrupted"
LEAST_S = 3.0
"""With less time than this left, a step is not begun."""
LAST_LINES = 3


@dataclass
class Outcome:
    """How a step ended; ``reason`` is empty where it was done."""

    outcome: str
    reason: str
    limit_s: float
    seconds: float = 0.0
    code: int | None = None
    log: str | None = None


class Session:
    """One run of the command: runs its steps one after the other, shows their progress and keeps their rows."""

    def __init__(self, out: Console, file: Path, logs: Path) -> None:
        self.out, self.file, self.logs = out, file, logs
        self.about = results.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self.rows: dict[str, list[Row]] = {}
        self.outcomes: list[tuple[str, Outcome]] = []
        """The kind of each step so far, and how it ended."""
        self.start_time = time.monotonic()

    def run(self, steps: Sequence[Step], total_s: float) -> int:
        """Runs the steps within ``total_s`` seconds; returns the exit code."""
        self.logs.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="g-"))  # short, for the paths of sockets
        ends = deadlines(steps, total_s)
        try:
            with bounded.owning_descendants():
                for step, end in zip(steps, ends, strict=True):
                    limit_s = end - (time.monotonic() - self.start_time)
                    if limit_s < LEAST_S:
                        self._keep(step, Outcome(NOT_BEGUN, "no time was left of --minutes", limit_s), [])
                    else:
                        self._run_step(step, limit_s, f"[{len(self.outcomes) + 1}/{len(steps)}] {step.name}", temporary)
        except KeyboardInterrupt:
            for step, end in list(zip(steps, ends, strict=True))[len(self.outcomes) :]:
                self._keep(step, Outcome(NOT_BEGUN, "Ctrl-C came before it", end), [])
            return ExitCode.INTERRUPTED
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return ExitCode.OK if all(outcome.outcome == DONE for _, outcome in self.outcomes) else ExitCode.FAILURE

    def _run_step(self, step: Step, limit_s: float, title: str, temporary: Path) -> None:
        number = len(self.outcomes) + 1
        rows_file, log = temporary / f"{number}.out", self.logs / f"{number:02}_{step.kind}.log"
        begun = time.monotonic()
        if not self.out.is_terminal:
            self.out.print(f"{title}: at most {limit_s:.0f} s")
        try:
            with self.out.status(title) as status:
                ended = bounded.run(
                    step.words(rows_file, limit_s),
                    log,
                    environment(temporary),
                    limit_s,
                    lambda elapsed: status.update(f"{title}  {elapsed:.0f} s of at most {limit_s:.0f} s"),
                )
        except KeyboardInterrupt:
            outcome = Outcome(INTERRUPTED, "Ctrl-C", limit_s, time.monotonic() - begun, None, str(log))
            self._keep(step, outcome, step.read(rows_file))
            raise
        made = step.read(rows_file)
        word = TOO_LONG if ended.code is None else FAILED
        if made and ended.code in (0, goals.MISSED):
            word = DONE
        reason = self._reason(word, made, log, ended.code, limit_s)
        self._keep(step, Outcome(word, reason, limit_s, ended.seconds, ended.code, str(log)), made)

    @staticmethod
    def _reason(outcome: str, rows: list[Row], log: Path, code: int | None, limit_s: float) -> str:
        """Why a step was not done, in a line."""
        if outcome == TOO_LONG:
            return f"not done after {limit_s:.0f} s, and ended"
        if outcome == DONE:
            return ""
        for row in rows:
            if row.get("failed_tests"):
                return f"{len(row['failed_tests'])} tests failed, first {row['failed_tests'][0]}"
            if row.get("failed") and row.get("bench") == "mfu":
                return str(row["failed"])
        lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("USDT:")]  # of torch's profiler
        return f"exit code {code}: {' / '.join(lines[-LAST_LINES:])[-200:] or 'no output'}"

    def _keep(self, step: Step, outcome: Outcome, made: list[Row]) -> None:
        """Adds the step's rows to the file, and shows how it ended."""
        self.outcomes.append((step.kind, outcome))
        name = {"run": self.run_id, "step": step.name}
        kept = [self.about | row | name for row in made]
        self.rows.setdefault(step.kind, []).extend(kept)
        results.append(self.file, [*kept, {"bench": "gpu", "kind": step.kind} | self.about | name | asdict(outcome)])
        words = figures(step.kind, kept) if outcome.outcome == DONE else outcome.reason
        color = "green" if outcome.outcome == DONE else "red"
        self.out.print(f"  [{color}]{outcome.outcome}[/] in {outcome.seconds:.0f} s: {step.name}: ", end="")
        self.out.print(words, markup=False, highlight=False)

    def report(self) -> None:
        """Prints the table of goals."""
        why = why_not(self.outcomes, self.about["device"])
        self.out.print(goals.verdict_table(goals.verdicts(self.rows, why)))
        count = sum(len(rows) for rows in self.rows.values()) + len(self.outcomes)
        self.out.print(f"{count} rows added to {self.file} in {time.monotonic() - self.start_time:.0f} s; ", end="")
        self.out.print(f"the output of each step is in {self.logs}")


def environment(temporary: Path) -> dict[str, str]:
    """The environment of a step: of this process, with this repository's modules, and temporary files in one place."""
    paths = [str(results.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "DS_BUILD_OPS": "0", "TMPDIR": str(temporary)}
    return {**os.environ, **own}


def why_not(outcomes: Sequence[tuple[str, Outcome]], device: str) -> dict[str, str]:
    """For each kind of step, why a goal of it was not measured if no row has its figure."""
    reasons = {}
    for kind in KINDS:
        of_kind = [outcome for its_kind, outcome in outcomes if its_kind == kind]
        undone = [outcome for outcome in of_kind if outcome.outcome != DONE]
        if device == results.CPU:
            reasons[kind] = "no GPU here"
        elif undone:
            reasons[kind] = f"{undone[0].outcome}: {undone[0].reason}"
        else:
            reasons[kind] = "no row has it: see the log of the step" if of_kind else "not among the steps of this run"
    return reasons


def figures(kind: str, rows: list[Row]) -> str:
    """The figures of a step's rows that are worth a line, of whatever device made them."""
    words: dict[str, Callable[[Row], str]] = {
        "tests": lambda row: f"{row['passed']} passed, {row['skipped']} skipped",
        "tiles": lambda row: f"tiles of {row['tuned']} cases",
        "steps": step_figures,
        "saves": lambda row: f"{row['saver']} {1e3 * row['stall_s'][0]:.1f} ms, {row['state_bytes'] / 1e9:.2f} GB",
        "restart": lambda row: (
            ", ".join(f"{marks['train']:.2f} s" for marks in row["recoveries"]) + " to the next step"
        ),
        "repeat": lambda row: "equal bit for bit" if row["equal"] else "not equal",
    }
    return f"{len(rows)} rows" if kind not in words else "; ".join(words[kind](row) for row in rows)


def step_figures(row: Row) -> str:
    """Milliseconds, speed, utilisation, memory and idle time of a training step; what was not measured is left out."""
    words = [f"{row['ms']:.1f} ms", f"{row['tokens_per_s']:,.0f} tokens/s", f"MFU {row['mfu']:.3f} of products"]
    if row["mfu_spec"] is not None:
        words.append(f"{row['mfu_spec']:.3f} of the data sheet")
    if row["peak_bytes"] is not None:
        words.append(f"{row['peak_bytes'] / 1e9:.1f} GB")
    if row["idle_ms"] is not None:
        words.append(f"idle {row['idle_ms']:.1f} ms")
    return ", ".join(words)


def kinds(text: str) -> list[str]:
    """The kinds of steps in a comma-separated list."""
    chosen = text.split(",")
    if unknown := set(chosen) - set(KINDS):
        raise argparse.ArgumentTypeError(f"no step {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return chosen


def main(arguments: list[str], steps: Sequence[Step] | None = None) -> int:
    """Runs the steps (of this machine's plan, or those given) and prints the table; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench gpu", description=__doc__, formatter_class=raw)
    parser.add_argument("--only", type=kinds, default=list(KINDS), help="some of: " + ", ".join(KINDS))
    parser.add_argument("--minutes", type=float, default=8.5, help="for all steps together; default: 8.5")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "gpu.jsonl", help="the file that rows go to")
    parser.add_argument("--logs", type=Path, help="the folder for the steps' output; default: runs/bench_gpu/<time>")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    known = plan(gpu, "overlap" in ZeroConfig.model_fields) if steps is None else steps
    chosen = [step for step in known if step.kind in options.only]
    out = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    session = Session(
        out, options.out, options.logs or Path("runs/bench_gpu") / datetime.now(UTC).strftime("%m%d-%H%M%S")
    )
    out.print("  ".join(f"{key} {value}" for key, value in session.about.items() if value))
    if not gpu:
        out.print("No GPU here: the same steps at the smallest sizes on the CPU, which count for no goal of a GPU.")
    code = session.run(chosen, 60 * options.minutes)
    session.report()
    return int(code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
