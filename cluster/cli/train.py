"""The verb ``train``: what a job's command line means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.driver import driver
from cluster.driver.early_start import EarlyStart
from train.config import load as configuration
from train.config.schema import Config
from train.data.corpus import shards
from train.data.prepare import prepare
from train.errors import ExitCode
from train.events import PrepareEvent
from train.pretrained import inspect_source
from train.run_dir import resume


def run(overrides: Sequence[str], begun: EarlyStart | None) -> int:
    """Runs the job, or with -m the sweep, that ``overrides`` ask for; explains them where nothing was begun. The exit code."""
    if begun is None:
        print(configuration.help_text())
        return ExitCode.OK
    if {"-m", "--multirun"} & set(overrides):
        from cluster.sweep import cli

        return cli.run([word for word in overrides if word not in ("-m", "--multirun")], find_corpus, begun)
    return driver.run(driver.Plan(lambda: configuration.load(overrides), find_corpus, resume.finished_summary), begun)


def find_corpus(config: Config, report: Callable[[dict[str, Any]], None]) -> str:
    """The folder of the prepared corpus, which is prepared first where it is missing or old.

    Raises UserError where ``run.dir`` holds a run that can not go on with this configuration, or on this corpus; and where a new
    one can not start from what ``init.from`` names.
    """
    resume.check_resumable(config, None)
    inspect_source.check_source(config)
    ready = prepare.find_prepared(config.data)
    if ready is None:
        ready = prepare.prepare(
            config.data, lambda progress: report(PrepareEvent(progress["phase"], progress).to_json()), config.objective
        )
    resume.check_resumable(config, shards.fingerprint(shards.read_index(ready)))
    return str(ready.absolute())
