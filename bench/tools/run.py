"""Runs a measurement of bench/ by name, for ``./launch.sh bench NAME``: it goes on whoever watches its output."""

from __future__ import annotations

import runpy
import signal
import sys
from pathlib import Path

from train.errors import ExitCode, UserError, guard_verb
from train.util import streams

BENCH = Path(__file__).parent.parent


def modules() -> dict[str, str]:
    """The module of each measurement by its name, {"step": "bench.nanogpt.step", ...}."""
    found = {}
    for file in sorted([*BENCH.glob("*.py"), *BENCH.glob("nanogpt/*.py")], key=lambda file: file.stem):
        if "\ndef main(" in file.read_text("utf-8"):
            found[file.stem] = ".".join(file.relative_to(BENCH.parent).with_suffix("").parts)
    return found


if __name__ == "__main__":
    streams.guard_report()
    streams.raise_on_signals(signal.SIGINT, signal.SIGHUP)
    name, *words = sys.argv[1:] or [""]
    known = modules()
    if name not in known:
        print(f"bench needs one of these names: {', '.join(known)}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    sys.argv = [name, *words]
    try:
        with guard_verb(words):
            runpy.run_module(known[name], run_name="__main__", alter_sys=True)
    except UserError as error:
        print(f"bench {name}: {error}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
