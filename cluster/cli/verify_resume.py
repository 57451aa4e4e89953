"""The verb ``verify-resume``: N + N steps with a real stop between against 2 N at once.

Both are runs of the user's own configuration, each by the command ``train`` in a process and a temporary folder of its
own. ``steps``, and so the schedule, stays as configured; the runs are ended once they have what is compared.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table
from rich.text import Text

from cluster.chaos.train_process import COMPARABLE_SETTINGS, TrainProcess, folder_of_verb, with_settings
from train.config import load as configuration
from train.errors import ExitCode, UserError, guard_verb
from train.reporting.terminal import UserConsole
from train.run_dir.compare import Comparison, compare
from train.util.format import plural
from train.util.run_layout import RunDir

HALF = 10
"""Steps before the stop, and as many after it."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGKILL)


def run(overrides: Sequence[str]) -> int:
    """verify-resume [group=choice] [key=value]: exit 0 only if a stopped run is the undisturbed one, bit for bit."""
    out = UserConsole()
    try:
        with guard_verb(overrides):
            return _verify_in_own_folder(out, overrides)
    except UserError as error:
        UserConsole(stderr=True).print(f"verify-resume: {error}")
        return ExitCode.BAD_INPUT


def _verify_in_own_folder(out: UserConsole, overrides: Sequence[str]) -> int:
    config = configuration.load(overrides)
    half = min(HALF, config.steps // 2)
    if not half:
        raise UserError(f"steps={config.steps}: it takes two to stop between them")
    with folder_of_verb(config.run.dir, "verify-resume") as folder:
        ours = [f"save_every={max(1, half // 2)}", "keep_last=1000", *COMPARABLE_SETTINGS]
        return _verify(out, folder, with_settings(overrides, ours), half)


def _verify(out: UserConsole, folder: Path, settings: Sequence[str], half: int) -> int:
    unbroken = TrainProcess(folder / "whole", settings)
    out.print(f"{2 * half} steps at once")
    _train_to_checkpoint(unbroken, 2 * half)
    table = Table(title=f"{half} + {half} steps against {2 * half}", title_justify="left")
    for column in ("stopped by", "after step", "compared", "of them", "equal"):
        table.add_column(column, justify="right" if column in ("after step", "of them") else "left")
    equal = True
    for number in STOP_SIGNALS:
        stopped = TrainProcess(folder / number.name, settings)
        stopped.take_kernels_of(unbroken)
        out.print(f"the same, stopped by {number.name}")
        stopped.start()
        stopped.wait_until(lambda run=stopped: run.step >= half, f"step {half}")  # type: ignore[misc]
        stopped.stop(number)
        stopped.wait_for_rank0()
        step = stopped.reached_step
        if step >= 2 * half:
            raise UserError(
                f"the run had made step {2 * half} when {number.name}, sent after step {half}, reached it: nothing was "
                "stopped, and nothing is proven. Take a larger batch.global, so that steps last longer, or more steps "
                f"(up to {2 * HALF} are made)"
            )
        _train_to_checkpoint(stopped, 2 * half)
        for n, comparison in enumerate(compare(stopped.folder, unbroken.folder, 2 * half)):
            equal = equal and comparison.difference is None
            table.add_row(number.name if not n else "", str(step) if not n else "", *_cells(comparison))
    out.print(table)
    out.print(_conclusion(equal, RunDir(unbroken.folder)))
    return ExitCode.OK if equal else ExitCode.FAILURE


def _conclusion(equal: bool, run: RunDir) -> Text:
    """The verdict in words, with the devices that it was seen on: of others it says nothing."""
    about = json.loads(run.environment.read_text("utf-8"))
    deterministic = yaml.safe_load(run.config.read_text("utf-8"))["cluster"]["deterministic"]
    where = f"{plural(about['workers'], 'worker')} on {about['device']}"
    where += f", cluster.deterministic={str(deterministic).lower()}"
    if equal:
        return Text(f"proven for {where}: a stopped run is the undisturbed one, bit for bit")
    cure = "" if deterministic else ". Try again with cluster.deterministic=true"
    return Text.assemble((f"not so for {where}: a stopped run is another run", "bold red"), cure)


def _train_to_checkpoint(run: TrainProcess, step: int) -> None:
    """Starts or continues a run, and ends it once it has the checkpoint of ``step``."""
    run.start()
    saved = RunDir(run.folder).checkpoint(step).is_dir
    run.wait_until(lambda: run.step >= step and saved(), f"the checkpoint of step {step}")
    run.stop(signal.SIGTERM)


def _cells(comparison: Comparison) -> tuple[str, str, str]:
    equal = "yes" if comparison.difference is None else f"no: {comparison.difference}"
    return comparison.subject, str(comparison.compared), equal
