"""The driver's command line: ``python -m cluster train [group=choice] [key=value]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from cluster import launch
from train import config as configuration
from train.data import prepare
from train.schema import Config


def main(arguments: list[str]) -> int:
    """Runs the verb that ``arguments`` name, and returns the exit code."""
    verb, *rest = arguments or ["train"]
    if verb != "train":
        print(f"there is no verb {verb!r}: try `python -m cluster train --help`", file=sys.stderr)
        return launch.BAD_INPUT
    if {"-h", "--help"} & set(rest):
        print(configuration.help_text())
        return launch.DONE
    elsewhere = any(argument.startswith(("cluster=", "cluster.address=", "experiment=")) for argument in rest)
    return launch.run(launch.Plan(lambda: configuration.load(rest), find_corpus, elsewhere))


def find_corpus(config: Config, report: Callable[[dict[str, Any]], None]) -> str:
    """The folder of the prepared corpus, which is prepared first where it is missing or old."""
    ready = prepare.resolve(config.data)
    if ready is None:
        ready = prepare.prepare(config.data, lambda progress: report({"event": "prepare", **progress}))
    return str(ready.absolute())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
