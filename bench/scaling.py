"""A scaling study as a sweep: fits a law to sizes and compute budgets, and predicts the largest size.

    ./launch.sh bench scaling [--sizes tiny|cluster] [--out sweeps/scaling] [--list] [key=value ...]

As many runs at once as there is room for; run again it goes on, as any sweep. The law is fitted without the largest
size, whose prediction stands beside its measurement. ``--list`` prints the trials and the command of the sweep, and
trains nothing.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from review.run_reader import read_runs
from review.scaling.isoflop_plan import PLANS, planned_runs
from review.scaling.study import fit_study, report_lines
from train.config import sweep_space
from train.errors import UserError
from train.util.io import write_whole

POINTS = "points.yaml"


def study_lines(out: Path) -> list[str]:
    """The report of the scaling law of the runs in a folder."""
    study = fit_study(read_runs([out]))
    return ["too few runs are finished for a law"] if study is None else report_lines(study)


def main(arguments: list[str]) -> int:
    """Runs the sweep, prints the law that its runs follow, and returns the sweep's exit code."""
    parser = argparse.ArgumentParser(prog="bench scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for every run, such as cluster.workers=8, and sweep.*"
    )
    parser.add_argument("--sizes", choices=tuple(PLANS), default="tiny")
    parser.add_argument("--out", type=Path, default=Path("sweeps/scaling"))
    parser.add_argument("--list", action="store_true", help="print the trials and the command, train nothing")
    options = parser.parse_args(arguments)
    plan, out = PLANS[options.sizes], options.out
    try:
        planned = planned_runs(plan, [text for text in options.overrides if not sweep_space.is_sweep_override(text)])
    except UserError as error:
        print(f"bench scaling: {error}", file=sys.stderr)
        return 2
    points = "".join(f"- [{', '.join(trial.point)}]  # {trial.name}\n" for trial in planned)
    own = (f"sweep.points={out / POINTS}", f"sweep.dir={out}", f"sweep.name={out.name}")
    words = ["train", "-m", *plan.overrides, *own, *options.overrides]
    if options.list:
        print(f"{points}# {out / POINTS}; ./launch.sh {shlex.join(words)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / POINTS, points.encode())
    code = subprocess.run([sys.executable, "-m", "cluster", *words], check=False).returncode
    if code != 2:
        print("\n".join(study_lines(out)), f"next: ./launch.sh review {out}", sep="\n", flush=True)
    return max(code, 1) if code < 0 else code  # a signal that ended it is a failure too


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
