"""A scaling study: trains its runs one after the other, fits the law, and predicts the largest size before training it.

    ./launch.sh bench scaling [--sizes tiny|cluster] [--out runs/scaling] [--list] [key=value ...]

Run again it goes on: runs that are complete are not run again. ``--list`` prints the command of every run instead, for a batch
system to spread over machines. Then: ./launch.sh review runs/scaling
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from review.plan import PLANS, Plan, Trial, trials
from train import resume
from train.errors import UserError


def run(trial: Trial) -> int:
    """The exit code of one run, with its output; 0 at once for one that is complete."""
    if resume.finished(trial.config):
        print(f"{trial.config.run.dir} is complete", flush=True)
        return 0
    environment = {**os.environ, "TRIREME_T0": str(time.time())}  # else each run's time would count from the study's start
    command = [sys.executable, "-m", "cluster", "train", *trial.overrides]
    return subprocess.run(command, env=environment, check=False).returncode


def main(arguments: list[str]) -> int:
    """Trains what is missing; the exit code of the first run that fails."""
    parser = argparse.ArgumentParser(prog="bench scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, such as cluster.workers=8")
    parser.add_argument("--sizes", choices=tuple(PLANS), default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--list", action="store_true", help="print the commands, train nothing")
    options = parser.parse_args(arguments)
    plan: Plan = PLANS[options.sizes]
    try:
        runs = list(trials(plan, str(options.out), options.overrides))
    except UserError as error:
        print(f"bench scaling: {error}", file=sys.stderr)
        return 2
    for trial in runs:
        if options.list:
            print("./launch.sh train", *trial.overrides)
        elif code := run(trial):
            print(f"{trial.name} ended with {code}: mend it and run this command again to go on", file=sys.stderr)
            return max(code, 1)  # a signal that ended it is a failure too
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
