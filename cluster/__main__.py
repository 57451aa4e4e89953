"""The command line: ``python -m cluster train [key=value]`` and ``python -m cluster cluster VERB``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from train.errors import ExitCode, UserError
from train.util import streams, utf8

VERBS = ("train", "cluster", "verify-resume", "verify-gradient", "drill")
HELP = {"-h", "--help"}


def main(arguments: list[str]) -> int:
    """Runs the verb that ``arguments`` begin with, ``train`` if there are none, and returns the exit code."""
    verb, *rest = arguments or ["train"]
    shows = {*HELP, "--list"} & set(rest) or (verb == "cluster" and rest[:1] not in (["up"], ["join"], ["down"]))
    (streams.guard_result if shows else streams.guard_report)()
    if verb not in VERBS:
        print(f"there is no verb {verb!r} here: try `python -m cluster train --help`", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if verb == "train":
        return _train(rest)
    streams.raise_on_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        return _run(verb, rest)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _run(verb: str, rest: Sequence[str]) -> int:
    """Runs a verb that has its runs, or a node, to end when it is interrupted."""
    if verb == "verify-resume":
        from cluster.cli import verify_resume

        return verify_resume.run(rest)
    if verb == "verify-gradient":
        from cluster.cli import verify_gradient

        return verify_gradient.run(rest)
    if verb == "drill":
        from cluster.chaos import drill

        return drill.run(rest)
    from cluster.cli import cluster

    return cluster.run(rest)


def _train(rest: Sequence[str]) -> int:
    """Runs a job or a sweep, whose driver handles its signals itself."""
    from cluster.host.stop_request import StopSignals

    signals = StopSignals()
    signals.install()  # before the other imports: Ctrl-C is meant from the first moment on
    from cluster.driver.early_start import start_early

    try:
        early = None if HELP & set(rest) else start_early(signals)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    # Imported only now: it takes a second, in which the fork server imports torch.
    from cluster.cli import train

    return train.run(rest, early)


if __name__ == "__main__":
    utf8.use_utf8()
    streams.end_on_interrupt()
    sys.exit(main(sys.argv[1:]))
