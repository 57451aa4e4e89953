"""Speed and memory goals of the kernels on an H200, each a ratio of two rows of one run."""

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
    """Minimum speed of ``ops`` relative to ``peer`` in a mode, at the shapes that ``shapes`` accepts."""

    ops: tuple[str, ...]
    mode: str
    peer: str
    min_ratio: float
    shapes: Callable[[str], bool] = lambda shape: True


def has_wide_rows(shape: str) -> bool:
    """Whether the rows of a norm, in a shape "R x D", have at least 4096 columns."""
    return int(shape.split(" x ")[1]) >= 4096


GOALS = (
    *(Goal(("attention",), mode, "sdpa flash", 1.5) for mode in (FORWARD, BOTH)),
    *(Goal(("attention",), mode, "sdpa cudnn", 0.9) for mode in (FORWARD, BOTH)),
    *(
        Goal(("packed_attention",), BOTH, peer, min_ratio)
        for peer, min_ratio in (("flex", 1.5), ("sdpa, dense mask", 3.0))
    ),
    Goal((*NORMS, *ADD_NORMS), BACKWARD, COMPILED, 2.0, has_wide_rows),
    Goal(ADD_NORMS, BOTH, LIGER, 1.4, has_wide_rows),
    *(Goal((*NORMS, *ADD_NORMS), mode, EAGER, 1.0) for mode in (FORWARD, BACKWARD, BOTH)),
    Goal(("cross_entropy",), BOTH, LIGER, 1.9),
    Goal(("linear_cross_entropy",), BOTH, EAGER, 1.0),
)
MIN_SHARES = ((FORWARD, 0.95), (BACKWARD, 0.90))
"""Minimum share of the measured copy rate by mode, for norms of wide rows."""


def table(rows: list[Row], size: Size) -> Table:
    """Table of every goal that this run has rows for: the ratio at each shape, and whether it is reached."""
    goal_table = Table(
        title="goals" if size.gpu else "goals (of a GPU: here they only show that they are computed)",
        title_justify="left",
    )
    for n, column in enumerate(("op", "shape", "mode", "what", "found", "goal", "")):
        goal_table.add_column(column, justify="right" if n in (4, 5) else "left", no_wrap=True)
    for op, shape, mode, what, ratio, goal, reached in (*speeds(rows), *bandwidth_shares(rows), *memory(rows)):
        mark = "[green]reached[/]" if reached else "[red]missed[/]"
        goal_table.add_row(op, shape, mode, what, f"{ratio:.2f}", goal, mark)
    return goal_table


GoalResult = tuple[str, str, str, str, float, str, bool]


def speeds(rows: list[Row]) -> Iterator[GoalResult]:
    """Speed relative to peers: the median over rounds of their time over ours."""
    by_key = {(r["op"], r["shape"], r["mode"], r["variant"]): r for r in rows if "rounds" in r}
    for goal in GOALS:
        for (op, shape, mode, variant), trireme_row in by_key.items():
            peer_row = by_key.get((op, shape, mode, goal.peer))
            if variant == OURS and op in goal.ops and mode == goal.mode and goal.shapes(shape) and peer_row:
                ratio = statistics.median(b / a for a, b in zip(trireme_row["rounds"], peer_row["rounds"], strict=True))
                yield op, shape, mode, f"speed / {goal.peer}", ratio, f">= {goal.min_ratio}", ratio >= goal.min_ratio


def bandwidth_shares(rows: list[Row]) -> Iterator[GoalResult]:
    """Shares of the copy rate that the norms reach."""
    for mode, min_ratio in MIN_SHARES:
        for row in rows:
            if (
                row["variant"] == OURS
                and row["mode"] == mode
                and row["op"] in NORMS + ADD_NORMS
                and has_wide_rows(row["shape"])
            ):
                yield (
                    row["op"],
                    row["shape"],
                    mode,
                    "share of the copy rate",
                    row["share"],
                    f">= {min_ratio}",
                    row["share"] >= min_ratio,
                )


def memory(rows: list[Row]) -> Iterator[GoalResult]:
    """Peak memory of the loss head relative to materialised logits and to Liger's, by formula where not run."""
    by_key = {(r["op"], r["shape"], r["variant"]): r["peak_bytes"] for r in rows if "peak_bytes" in r}
    for (op, shape, variant), peak in by_key.items():
        if op != "linear_cross_entropy" or variant != OURS:
            continue
        tokens, width, vocab = map(int, shape.split(" x "))
        materialised = by_key.get((op, shape, EAGER), materialised_head_bytes(tokens, vocab))
        itemsize = 4 if any(r["dtype"] == "float32" for r in rows) else 2
        liger_peak = by_key.get((op, shape, LIGER), liger_head_bytes(tokens, vocab, width, itemsize))
        yield (
            op,
            shape,
            BOTH,
            "peak / materialised",
            peak / materialised,
            "<= 0.125",
            peak <= materialised / 8,
        )
        yield op, shape, BOTH, "peak / liger", peak / liger_peak, "<= 1", peak <= liger_peak
