"""The verb ``verify-gradient``: the first gradient of the user's own run against plain autograd in one process.

The run is the command ``train`` in a process and a temporary folder of its own, ended once it has made its proof.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from cluster.chaos.train_process import COMPARABLE_SETTINGS, OWN_FILE, TrainProcess, folder_of_verb, with_settings
from train.config import load as configuration
from train.errors import ExitCode, UserError, guard_verb
from train.reporting.terminal import UserConsole
from train.util.format import plural
from train.util.reading import as_object, reading
from train.util.run_layout import RunDir


def run(overrides: Sequence[str]) -> int:
    """verify-gradient [group=choice] [key=value]: exit 0 only if the run's first gradient is that of plain autograd."""
    out = UserConsole()
    try:
        with guard_verb(overrides):
            return _verify_in_own_folder(out, overrides)
    except UserError as error:
        UserConsole(stderr=True).print(f"verify-gradient: {error}")
        return ExitCode.BAD_INPUT


def _verify_in_own_folder(out: UserConsole, overrides: Sequence[str]) -> int:
    config = configuration.load(overrides)
    with folder_of_verb(config.run.dir, "verify-gradient") as folder:
        settings = with_settings(overrides, ["verify.gradient=first_step", *COMPARABLE_SETTINGS])
        return _verify(out, TrainProcess(folder / "run", settings))


def _verify(out: UserConsole, run: TrainProcess) -> int:
    file = RunDir(run.folder).gradient
    run.start()
    run.wait_until(file.exists, "its first gradient")
    run.stop(signal.SIGTERM)
    run.wait_for_rank0()
    with reading(file, OWN_FILE):
        report = as_object(json.loads(file.read_text("utf-8")))
    out.print(_table(report))
    out.print(
        "proven: the engine's gradient is that of plain autograd in one process"
        if report["equal"]
        else f"not so: {report['difference']}"
    )
    return ExitCode.OK if report["equal"] else ExitCode.FAILURE


def _table(report: dict[str, Any]) -> Table:
    """The setting that was compared, and the largest difference in it."""
    targets = report["targets"]
    rows = {
        "engine": f"ZeRO stage {report['stage']}, {plural(report['workers'], 'worker')}, {report['precision']}",
        "accumulation": str(report["accumulation"]),
        "batch": f"{plural(report['rows'], 'row')}, " + ", ".join(f"{n} targets of {k}" for k, n in targets.items()),
        "compared": f"{report['compared']} of {plural(report['parameters'], 'parameter')}",
        "largest difference": f"{report['largest']:.1e} of the norm of {report['worst']}; "
        f"{report['tolerance']:.0e} is allowed",
        "norm": f"{report['norm']:.6g} before it is clipped",
    }
    table = Table(title="the gradient of the first step", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
