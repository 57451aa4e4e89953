"""Runs a measurement of bench/ by name, for ``./launch.sh bench NAME``: it goes on whoever watches its output."""

from __future__ import annotations

import runpy
import signal
import sys
from pathlib import Path

from train.errors import ExitCode
from train.util import streams

if __name__ == "__main__":
    streams.guard_report()
    streams.raise_on_signals(signal.SIGINT, signal.SIGHUP)
    _, name, *words = sys.argv
    known = sorted(file.stem for file in Path(__file__).parent.parent.glob("*.py") if file.stem != "__init__")
    if name not in known:
        print(f"bench: there is no {name!r}: {', '.join(known)}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    sys.argv = [name, *words]
    try:
        runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
