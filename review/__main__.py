"""``python -m review [runs...]``: what run folders tell, as a page, as pictures, or as a comment. No server, no network."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from train.util.io import write_whole

OK, BAD_INPUT = 0, 2


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    found = argparse.ArgumentParser(prog="./launch.sh review", description=(__doc__ or "").partition(": ")[2])
    found.add_argument(
        "runs", nargs="*", type=Path, default=[Path("runs")], help="run folders, or folders of them (default: runs)"
    )
    found.add_argument(
        "--out", type=Path, default=Path("runs/review"), help="where page and pictures go (default: runs/review)"
    )
    found.add_argument(
        "--format", choices=("html", "md", "png"), help="only this; md is printed (default: html and png)"
    )
    found.add_argument("--open", action="store_true", help="show the page in the browser")
    return found


def main(argv: Sequence[str]) -> int:
    """Writes the review and says where it is; the exit code."""
    options = parser().parse_args(argv)
    from review.run_reader import read_runs  # only now: --help needs none of it

    runs = read_runs(options.runs, options.out)
    if all(run.state == "missing" and run.trial is None for run in runs):
        print(
            f"review: no run in {', '.join(map(str, options.runs))}: give run folders, such as runs/gpt_mini-stdlib",
            file=sys.stderr,
        )
        return BAD_INPUT
    from review.scaling.study import fit_study

    law = fit_study(runs)
    from review.importance import key_importances

    found = key_importances(runs)
    if options.format == "md":
        from review.markdown import render_comment

        print(render_comment(runs, found, law))
        return OK
    if options.format != "html":
        from review import figures

        for file in figures.write_figures(runs, found, law, options.out):
            print(file)
    if options.format != "png":
        from review.html import page

        file = options.out / "review.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, page.render_page(runs, found, law).encode("utf-8", "replace"))
        print(f"{file}  ({len(runs)} runs, {file.stat().st_size / 1e6:.1f} MB, needs no server)")
        if options.open and not webbrowser.open(file.resolve().as_uri()):
            print(f"review: no browser was found here; open {file} in one", file=sys.stderr)
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
