"""The command ``python -m review [runs...]``: writes a page and figures, or prints a comment."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from train.errors import ExitCode, UserError, guard_verb
from train.util import streams, utf8
from train.util.io import write_whole

DESCRIPTION = "what run folders tell, as a page, as pictures, or as a comment. No server, no network."


def parser() -> argparse.ArgumentParser:
    """The parser of the command line of ``./launch.sh review``."""
    options = argparse.ArgumentParser(prog="./launch.sh review", description=DESCRIPTION)
    options.add_argument(
        "runs", nargs="*", type=Path, default=[Path("runs")], help="run folders, or folders of them (default: runs)"
    )
    options.add_argument(
        "--out", type=Path, default=Path("runs/review"), help="where page and pictures go (default: runs/review)"
    )
    options.add_argument(
        "--format", choices=("html", "md", "png"), help="only this; md is printed (default: html and png)"
    )
    options.add_argument("--open", action="store_true", help="show the page in the browser")
    return options


def main(argv: Sequence[str]) -> int:
    """Writes or prints the review of the runs in ``argv``, and returns the exit code."""
    options = parser().parse_args(argv)
    try:
        with guard_verb(argv):
            return _review(options)
    except UserError as error:
        print(f"review: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT


def _review(options: argparse.Namespace) -> int:
    """Reads the runs, and writes or prints their review."""
    from review.run_reader import read_runs  # lazy: --help needs no numpy

    runs = read_runs(options.runs, options.out)
    if all(run.state == "missing" and run.trial is None for run in runs):
        print(
            f"review: no run in {', '.join(map(str, options.runs))}: give run folders, such as runs/gpt_micro-stdlib",
            file=sys.stderr,
        )
        return ExitCode.BAD_INPUT
    from review.importance import key_importances
    from review.scaling.study import fit_study

    study, importances = fit_study(runs), key_importances(runs)
    if options.format == "md":
        from review.markdown import render_comment

        print(render_comment(runs, importances, study))
        return ExitCode.OK
    if options.format != "html":
        from review import figures

        for file in figures.write_figures(runs, importances, study, options.out):
            print(file)
    if options.format != "png":
        from review.html import page

        file = options.out / "review.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, page.render_page(runs, importances, study).encode("utf-8", "replace"))
        print(f"{file}  ({len(runs)} runs, {file.stat().st_size / 1e6:.1f} MB, needs no server)")
        if options.open and not webbrowser.open(file.resolve().as_uri()):
            print(f"review: no browser was found here; open {file} in one", file=sys.stderr)
    return ExitCode.OK


if __name__ == "__main__":
    utf8.use_utf8()
    streams.end_on_interrupt()
    # Only the page and the figures are written whether or not somebody reads their names.
    shows = {"-h", "--help", "md", "--format=md"} & set(sys.argv[1:])
    (streams.guard_result if shows else streams.guard_report)()
    sys.exit(main(sys.argv[1:]))
