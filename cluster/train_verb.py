"""The verb ``train``: what a job's command line means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster import launch
from cluster.begin import Begun
from train import beginning, resume
from train import config as configuration
from train.data import prepare, shards
from train.schema import Config


def run(overrides: Sequence[str], begun: Begun | None) -> int:
    """Runs the job, or with -m the sweep, that ``overrides`` ask for; explains them where nothing was begun. The exit code."""
    if begun is None:
        print(configuration.help_text())
        return launch.DONE
    if {"-m", "--multirun"} & set(overrides):
        from cluster.sweep import command

        return command.run([word for word in overrides if word not in ("-m", "--multirun")], find_corpus, begun)
    return launch.run(launch.Plan(lambda: configuration.load(overrides), find_corpus, resume.finished), begun)


def find_corpus(config: Config, report: Callable[[dict[str, Any]], None]) -> str:
    """The folder of the prepared corpus, which is prepared first where it is missing or old.

    Raises UserError where ``run.dir`` holds a run that can not go on with this configuration, or on this corpus; and where a new
    one can not start from what ``init.from`` names.
    """
    resume.check(config, None)
    beginning.check(config)
    ready = prepare.resolve(config.data)
    if ready is None:
        ready = prepare.prepare(config.data, lambda progress: report({"event": "prepare", **progress}), config.objective)
    resume.check(config, shards.fingerprint(shards.read_index(ready)))
    return str(ready.absolute())
