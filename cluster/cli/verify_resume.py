"""The verb ``verify-resume``: N steps and N more, a real stop between them, against 2 N at once, on the user's own configuration.

Each run is the command ``train`` in a process of its own and a folder of its own, which are gone afterwards. The configuration
stays as it is, ``steps`` and so the schedule included; the runs are ended once they have what is compared.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.chaos.train_process import BESIDE, TrainProcess, with_settings
from train.config import load as configuration
from train.errors import ExitCode, UserError
from train.run_dir.compare import Comparison, compare
from train.util.run_layout import RunDir

HALF = 10
"""Steps before the stop, and after it."""
WAYS = (signal.SIGTERM, signal.SIGKILL)


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
            settings = with_settings(overrides, [f"save_every={max(1, half // 2)}", "keep_last=1000", *BESIDE])
            return _verify(out, folder, settings, half)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except UserError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"verify-resume: {error}", markup=False)
        return ExitCode.BAD_INPUT


def _verify(out: Console, folder: Path, settings: Sequence[str], half: int) -> int:
    whole = TrainProcess(folder / "whole", settings)
    out.print(f"{2 * half} steps at once")
    _make(whole, 2 * half)
    table = Table(title=f"{half} + {half} steps against {2 * half}", title_justify="left")
    for column in ("stopped by", "after step", "compared", "of them", "equal"):
        table.add_column(column, justify="right" if column in ("after step", "of them") else "left")
    equal = True
    for way in WAYS:
        part = TrainProcess(folder / way.name, settings)
        out.print(f"the same, stopped by {way.name}")
        part.start()
        part.until(lambda part=part: part.step >= half, f"step {half}")  # type: ignore[misc]
        part.end(way)
        stopped = part.step
        if stopped >= 2 * half:
            raise UserError(
                f"the steps are too short to stop between step {half} and {2 * half}: take a larger batch.global"
            )
        _make(part, 2 * half)
        for n, finding in enumerate(compare(part.folder, whole.folder, 2 * half)):
            equal = equal and finding.difference is None
            table.add_row(way.name if not n else "", str(stopped) if not n else "", *_cells(finding))
    out.print(table)
    out.print(
        "a stopped run is the undisturbed one, bit for bit" if equal else "[bold red]a stopped run is another run[/]"
    )
    return ExitCode.OK if equal else ExitCode.FAILURE


def _make(run: TrainProcess, step: int) -> None:
    """Has it go on until it has the checkpoint of a step, and ends it."""
    run.start()
    run.until(RunDir(run.folder).checkpoint(step).is_dir, f"the checkpoint of step {step}")
    run.end(signal.SIGTERM)


def _cells(finding: Comparison) -> tuple[str, str, str]:
    return finding.subject, str(finding.compared), "yes" if finding.difference is None else f"no: {finding.difference}"
