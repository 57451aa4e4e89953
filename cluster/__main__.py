"""The command line: ``python -m cluster train [group=choice] [key=value]`` and ``python -m cluster cluster VERB``."""

from __future__ import annotations

import sys

from cluster.signals import Signals
from train import redact

VERBS = ("train", "cluster", "verify-resume", "drill")


def main(arguments: list[str]) -> int:
    """Runs the verb that ``arguments`` name, and returns the exit code."""
    redact.cover()
    verb, *rest = arguments or ["train"]
    if verb not in VERBS:
        print(f"there is no verb {verb!r} here: try `python -m cluster train --help`", file=sys.stderr)
        return 2
    if verb == "verify-resume":
        from cluster import verify

        return verify.run(rest)
    if verb == "drill":
        from cluster import drill_verb

        return drill_verb.run(rest)
    if verb == "cluster":
        from cluster import cluster_verb

        return cluster_verb.run(rest)
    signals = Signals()
    signals.listen()  # before the other imports: Ctrl-C is meant from the first moment on
    from cluster.begin import begin

    begun = None if {"-h", "--help"} & set(rest) else begin(signals)
    # Only now: these imports take a second, in which the warm process gets on with its own.
    from cluster import train_verb

    return train_verb.run(rest, begun)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
