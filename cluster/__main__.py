"""The command line: ``python -m cluster train [key=value]`` and ``python -m cluster cluster VERB``."""

from __future__ import annotations

import sys

from cluster.host.stop_request import StopSignals
from train.errors import ExitCode
from train.util import redact, utf8

VERBS = ("train", "cluster", "verify-resume", "drill")


def main(arguments: list[str]) -> int:
    """Runs the verb that ``arguments`` begin with, ``train`` if there are none, and returns the exit code."""
    redact.redact_output()
    verb, *rest = arguments or ["train"]
    if verb not in VERBS:
        print(f"there is no verb {verb!r} here: try `python -m cluster train --help`", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if verb == "verify-resume":
        from cluster.cli import verify_resume

        return verify_resume.run(rest)
    if verb == "drill":
        from cluster.chaos import drill

        return drill.run(rest)
    if verb == "cluster":
        from cluster.cli import cluster

        return cluster.run(rest)
    signals = StopSignals()
    signals.install()  # before the other imports: Ctrl-C is meant from the first moment on
    from cluster.driver.early_start import start_early

    early = None if {"-h", "--help"} & set(rest) else start_early(signals)
    # Imported only now: it takes a second, in which the fork server imports torch.
    from cluster.cli import train

    return train.run(rest, early)


if __name__ == "__main__":
    utf8.use_utf8()
    sys.exit(main(sys.argv[1:]))
