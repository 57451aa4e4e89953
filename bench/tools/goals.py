"""The goals of the kernels on an H200, each a ratio of two rows of one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.tools.cases import BACKWARD, BOTH, FORWARD, OURS, Size
from bench.tools.memory import liger_head_bytes, materialised_head_bytes
from bench.tools.peers import COMPILED, EAGER, LIGER

Row = dict[str, Any]
NORMS, ADD_NORMS = ("rms_norm", "layer_norm"), ("add_rms_norm", "add_layer_norm")


@dataclass(frozen=True)
class Goal:
    """How many times as fast as ``peer`` these ops are to be in this mode, at some shapes."""

    ops: tuple[str, ...]
    mode: str
    peer: str
    least: float
    shapes: Callable[[str], bool] = lambda shape: True


def wide(shape: str) -> bool:
    """Whether rows of a norm are 4k to 16k wide."""
    return int(shape.split(" x ")[1]) >= 4096


GOALS = (
    *(Goal(("attention",), mode, "sdpa flash", 1.5) for mode in (FORWARD, BOTH)),
    *(Goal(("attention",), mode, "sdpa cudnn", 0.9) for mode in (FORWARD, BOTH)),
    *(Goal(("packed_attention",), BOTH, peer, least) for peer, least in (("flex", 1.5), ("sdpa, dense mask", 3.0))),
    Goal((*NORMS, *ADD_NORMS), BACKWARD, COMPILED, 2.0, wide),
    Goal(ADD_NORMS, BOTH, LIGER, 1.4, wide),
    *(Goal((*NORMS, *ADD_NORMS), mode, EAGER, 1.0) for mode in (FORWARD, BACKWARD, BOTH)),
    Goal(("cross_entropy",), BOTH, LIGER, 1.9),
    Goal(("linear_cross_entropy",), BOTH, EAGER, 1.0),
)
SHARES = ((FORWARD, 0.95), (BACKWARD, 0.90))
"""Of the measured copy rate, for norms of wide rows."""


def table(rows: list[Row], size: Size) -> Table:
    """Every goal that this run has rows for: the ratio at each shape, and whether it is reached."""
    found = Table(
        title="goals" if size.gpu else "goals (of a GPU: here they only show that they are computed)",
        title_justify="left",
    )
    for n, column in enumerate(("op", "shape", "mode", "what", "found", "goal", "")):
        found.add_column(column, justify="right" if n in (4, 5) else "left", no_wrap=True)
    for op, shape, mode, what, ratio, goal, reached in (*speeds(rows), *shares(rows), *memory(rows)):
        mark = "[green]reached[/]" if reached else "[red]missed[/]"
        found.add_row(op, shape, mode, what, f"{ratio:.2f}", goal, mark)
    return found


Line = tuple[str, str, str, str, float, str, bool]


def speeds(rows: list[Row]) -> Iterator[Line]:
    """Their time over ours: the median of the rounds' ratios."""
    by_key = {(r["op"], r["shape"], r["mode"], r["variant"]): r for r in rows if "rounds" in r}
    for goal in GOALS:
        for (op, shape, mode, variant), ours in by_key.items():
            theirs = by_key.get((op, shape, mode, goal.peer))
            if variant == OURS and op in goal.ops and mode == goal.mode and goal.shapes(shape) and theirs:
                ratio = statistics.median(b / a for a, b in zip(ours["rounds"], theirs["rounds"], strict=True))
                yield op, shape, mode, f"speed / {goal.peer}", ratio, f">= {goal.least}", ratio >= goal.least


def shares(rows: list[Row]) -> Iterator[Line]:
    """Of the copy rate."""
    for mode, least in SHARES:
        for row in rows:
            if row["variant"] == OURS and row["mode"] == mode and row["op"] in NORMS + ADD_NORMS and wide(row["shape"]):
                yield (
                    row["op"],
                    row["shape"],
                    mode,
                    "share of the copy rate",
                    row["share"],
                    f">= {least}",
                    row["share"] >= least,
                )


def memory(rows: list[Row]) -> Iterator[Line]:
    """Of the head: beside the materialised one's in this run, and Liger's, by its formula where it did not run."""
    by_key = {(r["op"], r["shape"], r["variant"]): r["peak_bytes"] for r in rows if "peak_bytes" in r}
    for (op, shape, variant), ours in by_key.items():
        if op != "linear_cross_entropy" or variant != OURS:
            continue
        tokens, width, vocab = map(int, shape.split(" x "))
        whole = by_key.get((op, shape, EAGER), materialised_head_bytes(tokens, vocab))
        itemsize = 4 if any(r["dtype"] == "float32" for r in rows) else 2
        liger = by_key.get((op, shape, LIGER), liger_head_bytes(tokens, vocab, width, itemsize))
        yield op, shape, BOTH, "peak / materialised", ours / whole, "<= 0.125", ours <= whole / 8
        yield op, shape, BOTH, "peak / liger", ours / liger, "<= 1", ours <= liger
