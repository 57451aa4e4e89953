"""The verb ``verify-resume``: N steps and N more, a real stop between them, against 2 N at once, on the user's own configuration.

Each run is the command ``train`` in a process of its own and a folder of its own, which are gone afterwards. The configuration
stays as it is, ``steps`` and so the schedule included; the runs are ended once they have what is compared.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from train import config as configuration
from train.compare import Finding, compare
from train.errors import UserError
from train.tracking import read_records

HALF = 10
"""Steps before the stop, and after it."""
TIMEOUT_S = 1800.0
OK, DIFFERENT, BAD_INPUT = 0, 1, 2
WAYS = (signal.SIGTERM, signal.SIGKILL)


class Run:
    """The command ``train`` on one folder, started as often as need be."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "cluster", "train", *overrides, f"run.dir={folder}"]

    def until(self, reached: Callable[[Run], bool], end: signal.Signals) -> int:
        """Start, wait until something is reached, then send the driver a signal; returns the step of the last line written.

        Raises UserError with the run's last words where it ends by itself before that.
        """
        log = self.folder.with_suffix(".log")
        deadline = time.monotonic() + TIMEOUT_S
        with log.open("ab") as out:
            process = subprocess.Popen(self.command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while not reached(self):
                if process.poll() is not None and not reached(self):
                    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    raise UserError(f"the run ended with exit code {process.returncode} before its time:\n{last}")
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the run did not come so far within {TIMEOUT_S:.0f} s; its output ends:\n{log.read_text()[-2000:]}"
                    )
                time.sleep(0.05)
            process.send_signal(end)
            process.wait(120)
        finally:
            process.kill()
            process.wait()
        return self.step

    @property
    def step(self) -> int:
        """The last step that metrics.jsonl has."""
        return max((record["step"] for record in read_records(self.folder / "metrics.jsonl")), default=0)

    def saved(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete."""
        return (self.folder / "checkpoints" / f"step_{step}").is_dir()


def run(overrides: Sequence[str]) -> int:
    """verify-resume [group=choice] [key=value]: exit 0 only if a stopped run is the undisturbed one, bit for bit."""
    out = Console(highlight=False, soft_wrap=True)
    try:
        config = configuration.load(overrides)
        half = min(HALF, config.steps // 2)
        if not half:
            raise UserError(f"steps={config.steps}: it takes two to stop between them")
        beside = Path(config.run.dir or ".").absolute().parent  # where every worker sees it
        beside.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".verify-resume-", dir=beside))
        try:
            return _verify(out, folder, _settings(overrides, half), half)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except UserError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"verify-resume: {error}", markup=False)
        return BAD_INPUT


def _settings(overrides: Sequence[str], half: int) -> list[str]:
    """The user's overrides, and what the comparison needs: every line, checkpoints of both halves, nothing beside."""
    needed = [f"save_every={max(1, half // 2)}", "keep_last=1000", "keep_best=0", "log_every=1", "eval_every=0"]
    ours = [*needed, "tracking.wandb=off", "generation.prompts=[]"]
    keys = {setting.partition("=")[0] for setting in ours} | {"run.dir"}
    return [o for o in overrides if o.partition("=")[0].lstrip("+") not in keys] + ours


def _verify(out: Console, folder: Path, settings: Sequence[str], half: int) -> int:
    whole = Run(folder / "whole", settings)
    out.print(f"{2 * half} steps at once")
    whole.until(lambda run: run.saved(2 * half), signal.SIGTERM)
    table = Table(title=f"{half} + {half} steps against {2 * half}", title_justify="left")
    for column in ("stopped by", "after step", "compared", "of them", "equal"):
        table.add_column(column, justify="right" if column in ("after step", "of them") else "left")
    equal = True
    for way in WAYS:
        part = Run(folder / way.name, settings)
        out.print(f"the same, stopped by {way.name}")
        stopped = part.until(lambda run: run.step >= half, way)
        if stopped >= 2 * half:
            raise UserError(f"the steps are too short to stop between step {half} and {2 * half}: take a larger batch.global")
        part.until(lambda run: run.saved(2 * half), signal.SIGTERM)
        for n, finding in enumerate(compare(part.folder, whole.folder, 2 * half)):
            equal = equal and finding.difference is None
            table.add_row(way.name if not n else "", str(stopped) if not n else "", *_cells(finding))
    out.print(table)
    out.print("a stopped run is the undisturbed one, bit for bit" if equal else "[bold red]a stopped run is another run[/]")
    return OK if equal else DIFFERENT


def _cells(finding: Finding) -> tuple[str, str, str]:
    return finding.what, str(finding.compared), "yes" if finding.difference is None else f"no: {finding.difference}"
