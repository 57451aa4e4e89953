"""Feeds mutated files to the product's readers: only typed errors, no hang, no memory that a header merely announces.

    PYTHONPATH=.:tests .venv/bin/python -m fuzz.campaign [inputs=1000000] [seconds=300] [seed=0] [only=TEXT]

For each format so many inputs, or so many seconds of one core (processor time), whatever ends first; a table at the
end, and a finding by its traceback with the input in a file. ``test_readers.py`` runs a bounded part of the same.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.formats import TYPED, Format, all_formats

from train.errors import guard_verb

INPUT_S = 5.0
"""Longest that one input of some kilobytes may take, of the processor: the machine may be busy."""
WAIT_S = 60.0
"""Longest that it may take by the clock: a reader that waits for something uses no processor."""
ROOM_BYTES = 2 << 30
"""Address space that reading may add to this process: more than any input needs, less than a crafted one asks."""
MOST_FINDINGS = 20
"""Different findings of a format after which it is left."""


class Hang(BaseException):
    """One input took too long; no reader's ``except`` takes it for an error of the content."""


@dataclass
class Outcome:
    """The figures of one format: inputs and how they ended."""

    name: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    findings: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    """By where it was raised: (number of the input, traceback, the input)."""


def fuzz(form: Format, inputs: int, seconds: float, seed: int) -> Outcome:
    """Read ``inputs`` mutations of a format's seeds, for at most ``seconds``. A function of the seed but for time."""
    outcome, draw = Outcome(form.name), random.Random(f"{seed} {form.name}")
    began = time.process_time()
    with _limits():
        for valid in form.seeds:
            form.read(valid)
        while outcome.inputs < inputs and len(outcome.findings) < MOST_FINDINGS:
            content = form.mutation(draw, draw.choice(form.seeds))
            start = time.process_time()
            if start - began > seconds:
                break
            _read(form, content, outcome)
            outcome.slowest_s = max(outcome.slowest_s, time.process_time() - start)
    outcome.seconds = time.process_time() - began
    return outcome


def _read(form: Format, content: bytes, outcome: Outcome) -> None:
    outcome.inputs += 1
    signal.setitimer(signal.ITIMER_PROF, INPUT_S)
    signal.setitimer(signal.ITIMER_REAL, WAIT_S)
    try:
        with guard_verb():
            form.read(content)
    except TYPED as error:
        outcome.refused += 1
        message = str(error)
        if isinstance(error.__cause__, MemoryError) or len(message) > 100_000:
            _find(outcome, error, content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        _find(outcome, error, content)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _find(outcome: Outcome, error: BaseException, content: bytes) -> None:
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/fuzz/" not in frame.filename]
    last = (ours or frames)[-1]
    where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    if where not in outcome.findings:
        text = "".join(traceback.format_exception(error)[-12:])[-3000:]
        outcome.findings[where] = outcome.inputs, text, content


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """A bound on memory, an alarm for a slow input, and a dump of the stack where nothing else ends it."""

    def on_alarm(number: int, frame: object) -> None:
        raise Hang(f"no answer within {INPUT_S:.0f} s of the processor, or {WAIT_S:.0f} s in all")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = {number: signal.signal(number, on_alarm) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def main(words: list[str]) -> int:
    """Run the campaign and print its table; 1 where anything was found."""
    options: dict[str, Any] = {"inputs": "1000000", "seconds": "300", "seed": "0", "only": ""}
    options |= dict(word.split("=", 1) for word in words)
    faulthandler.enable()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fuzz-") as folder:
        os.chdir(folder)
        outcomes = []
        for form in all_formats(Path(folder)):
            if options["only"] in form.name:
                outcome = fuzz(form, int(options["inputs"]), float(options["seconds"]), int(options["seed"]))
                outcomes.append(outcome)
                print(_row(outcome), flush=True)
                for where, (number, text, content) in outcome.findings.items():
                    file = (
                        Path(tempfile.gettempdir())
                        / f"finding-{form.name.replace(' ', '-').replace('/', '-')}-{number}"
                    )
                    file.write_bytes(content)
                    print(f"--- {where}: input {number}, {file}\n{text}", flush=True)
        os.chdir("/")
    found = sum(len(outcome.findings) for outcome in outcomes)
    print(f"{sum(outcome.inputs for outcome in outcomes):,} inputs, {found} findings")
    return int(found > 0)


def _row(outcome: Outcome) -> str:
    each = outcome.seconds / max(1, outcome.inputs) * 1e6
    return (
        f"| {outcome.name:32} | {outcome.inputs:>9,} | {outcome.refused:>9,} | {outcome.seconds:7.1f} | {each:8.0f} | "
        f"{outcome.slowest_s * 1e3:8.1f} | {len(outcome.findings):>3} |"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
