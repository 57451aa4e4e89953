"""The goals of one GPU, and whether the rows of a run reach them; those of the kernels are for an H200.

A goal without a row of a GPU is not measured, whatever other rows there are.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from bench.tools.cases import BACKWARD, BOTH, FORWARD, OURS, Size
from bench.tools.memory import liger_head_bytes, materialised_head_bytes
from bench.tools.peers import COMPILED, EAGER, LIGER
from bench.tools.results import CPU

Row = dict[str, Any]
MISSED = 3
"""Exit code of a benchmark that measured all it should, and missed a goal."""
MFU, MFU_1B, MFU_SPEC_1B = 0.50, 0.73, 0.58
"""Model FLOPs over those of matrix products measured beside them, for every model and for llama_1b; llama_1b's over the
data sheet's, which is as much: products reach 788 of 989 TFLOP/s on an H200."""
STALL_RATIO, GPU_STALL_RATIO, GPU_STALL_S = 0.25, 0.1, 0.05
"""Stall of a save over that of async_save: anywhere, and on a GPU; and in seconds on a GPU."""
RESTART_S, GPU_RESTART_S, GPU_RESTART_WORST_S = 2.0, 1.0, 2.0
"""Seconds from a SIGKILL to the next step of all: the median anywhere, the median and the worst on a GPU."""
SCALE_NOTICED_S, SCALE_RESTARTED_S, SCALE_DRIVER_CORES = 5.0, 10.0, 0.5
"""Seconds from a fault to its report, of a hang beyond the hang timeout; from there until all ranks have met again; and
cores of the driver."""
NORMS, ADD_NORMS = ("rms_norm", "layer_norm"), ("add_rms_norm", "add_layer_norm")


@dataclass(frozen=True)
class Goal:
    """Minimum speed of ``ops`` relative to ``peer`` in a mode, at the shapes that ``shapes`` accepts."""

    id: str
    ops: tuple[str, ...]
    mode: str
    peer: str
    min_ratio: float
    shapes: Callable[[str], bool] = lambda shape: True


def has_wide_rows(shape: str) -> bool:
    """Whether the rows of a norm, in a shape "R x D", have at least 4096 columns."""
    return int(shape.split(" x ")[1]) >= 4096


GOALS = (
    *(Goal("P1", ("attention",), mode, "sdpa flash", 1.5) for mode in (FORWARD, BOTH)),
    *(Goal("P1", ("attention",), mode, "sdpa cudnn", 0.9) for mode in (FORWARD, BOTH)),
    *(
        Goal("P2", ("packed_attention",), BOTH, peer, min_ratio)
        for peer, min_ratio in (("flex", 1.5), ("sdpa, dense mask", 3.0))
    ),
    *(Goal("P4", (*NORMS, *ADD_NORMS), mode, EAGER, 1.0) for mode in (FORWARD, BACKWARD, BOTH)),
    Goal("P4", (*NORMS, *ADD_NORMS), BACKWARD, COMPILED, 2.2, has_wide_rows),
    Goal("P5", ADD_NORMS, BOTH, LIGER, 1.4, has_wide_rows),
    Goal("P5", ADD_NORMS, BOTH, COMPILED, 1.2, has_wide_rows),
    Goal("P6", ("cross_entropy",), BOTH, LIGER, 1.9),
    Goal("P7", ("linear_cross_entropy",), BOTH, EAGER, 1.0),
)
SUBJECTS = {
    "P1": "attention",
    "P2": "packed attention",
    "P4": "norms",
    "P5": "add and norm",
    "P6": "cross-entropy",
    "P7": "head with loss",
}
"""The ops of each goal of the kernels, in words."""
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
    for _, op, shape, mode, what, ratio, goal, reached in kernel_results(rows):
        mark = "[green]reached[/]" if reached else "[red]missed[/]"
        goal_table.add_row(op, shape, mode, what, f"{ratio:.2f}", goal, mark)
    return goal_table


class GoalResult(NamedTuple):
    """One goal of the kernels at one shape: what was found, what it should be, and whether it is."""

    id: str
    op: str
    shape: str
    mode: str
    what: str
    found: float
    goal: str
    reached: bool


def kernel_results(rows: list[Row]) -> list[GoalResult]:
    """The results of all goals of the kernels that there are rows for."""
    return [*speeds(rows), *speeds_of_choice(rows), *bandwidth_shares(rows), *memory(rows)]


def speeds(rows: list[Row]) -> Iterator[GoalResult]:
    """Speed relative to peers: the median over rounds of their time over ours."""
    by_key = {(r["op"], r["shape"], r["mode"], r["variant"]): r for r in rows if "rounds" in r}
    for goal in GOALS:
        for (op, shape, mode, variant), trireme_row in by_key.items():
            peer_row = by_key.get((op, shape, mode, goal.peer))
            if variant == OURS and op in goal.ops and mode == goal.mode and goal.shapes(shape) and peer_row:
                ratio = statistics.median(b / a for a, b in zip(trireme_row["rounds"], peer_row["rounds"], strict=True))
                what, bound = f"speed / {goal.peer}", f">= {goal.min_ratio}"
                yield GoalResult(goal.id, op, shape, mode, what, ratio, bound, ratio >= goal.min_ratio)


def speeds_of_choice(rows: list[Row]) -> Iterator[GoalResult]:
    """Speed of the attention that runs, relative to the fastest backend of torch's at that shape."""
    timed = [row for row in rows if row["op"] == "attention" and row["mode"] == BOTH and "rounds" in row]
    for row in timed:
        peers = [r for r in timed if r["shape"] == row["shape"] and r["variant"].startswith("sdpa")]
        if row["variant"] == OURS and peers:
            ratio = min(statistics.median(peer["rounds"]) for peer in peers) / statistics.median(row["rounds"])
            yield GoalResult("P1", "attention", row["shape"], BOTH, "speed / best sdpa", ratio, ">= 1.0", ratio >= 1.0)


def bandwidth_shares(rows: list[Row]) -> Iterator[GoalResult]:
    """Shares of the copy rate that the norms reach."""
    for mode, min_ratio in MIN_SHARES:
        for row in rows:
            ours = row["variant"] == OURS and row["mode"] == mode and row["op"] in NORMS + ADD_NORMS
            if ours and "share" in row and has_wide_rows(row["shape"]):
                share, bound = row["share"], f">= {min_ratio}"
                what = "share of the copy rate"
                yield GoalResult("P4", row["op"], row["shape"], mode, what, share, bound, share >= min_ratio)


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
        for peer, peer_peak, bound in (("materialised", materialised, 0.125), ("liger", liger_peak, 1.0)):
            ratio = peak / peer_peak
            yield GoalResult("P7", op, shape, BOTH, f"peak / {peer}", ratio, f"<= {bound:g}", ratio <= bound)


class Verdict(NamedTuple):
    """A line of the table of goals. ``reached`` is None, and ``found`` empty, where it was not measured."""

    id: str
    what: str
    found: str
    goal: str
    reached: bool | None
    why: str
    """Why it was not measured, or what the number is of."""


@dataclass(frozen=True)
class Figure:
    """A goal for one number that the rows of a step of ``bench gpu`` have: at least ``least`` or at most ``most``."""

    id: str
    what: str
    step: str
    find: Callable[[list[Row]], float | None]
    least: float | None = None
    most: float | None = None

    @property
    def goal(self) -> str:
        """The bound, as text."""
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"

    def verdict(self, rows: list[Row], why_not: str) -> Verdict:
        """The line for these rows, all of a GPU; ``why_not`` says why there is none that counts."""
        found = self.find(rows)
        if found is None:
            return Verdict(self.id, self.what, "", self.goal, None, why_not)
        reached = found >= self.least if self.least is not None else found <= (self.most or 0.0)
        return Verdict(self.id, self.what, f"{found:.3g}", self.goal, reached, "")


def utilisation_of(model: str, key: str) -> Callable[[list[Row]], float | None]:
    """Finds the best utilisation of a model, over ZeRO stages and other settings."""

    def find(rows: list[Row]) -> float | None:
        return max((row[key] for row in rows if row.get("model") == model and row.get(key) is not None), default=None)

    return find


def stall(rows: list[Row]) -> float | None:
    """Our median stall in seconds."""
    return next((statistics.median(row["stall_s"]) for row in rows if row.get("saver") == "ours"), None)


def stall_ratio(rows: list[Row]) -> float | None:
    """Our median stall over that of the faster async_save."""
    peers = [statistics.median(row["stall_s"]) for row in rows if str(row.get("saver")).startswith("async_save")]
    ours = stall(rows)
    return None if ours is None or not peers else ours / min(peers)


def recovery(pick: Callable[[Iterable[float]], float]) -> Callable[[list[Row]], float | None]:
    """Finds the median, or the worst, of the seconds of all recoveries."""

    def find(rows: list[Row]) -> float | None:
        seconds = [marks["train"] for row in rows for marks in row.get("recoveries", [])]
        return pick(seconds) if seconds else None

    return find


def equal_runs(rows: list[Row]) -> float | None:
    """1 if the runs were equal bit for bit, 0 if they were not."""
    return next((float(row["equal"]) for row in rows if "equal" in row), None)


FIGURES = (
    Figure("P8", "gpt2_124m: MFU of measured products", "steps", utilisation_of("gpt2_124m", "mfu"), least=MFU),
    Figure("P8", "llama_1b: MFU of measured products", "steps", utilisation_of("llama_1b", "mfu"), least=MFU_1B),
    Figure("P8", "llama_1b: MFU of the data sheet", "steps", utilisation_of("llama_1b", "mfu_spec"), least=MFU_SPEC_1B),
    Figure("P14", "stall of a save / async_save's", "saves", stall_ratio, most=GPU_STALL_RATIO),
    Figure("P14", "stall of a save, seconds", "saves", stall, most=GPU_STALL_S),
    Figure("R1", "SIGKILL to the next step: median s", "restart", recovery(statistics.median), most=GPU_RESTART_S),
    Figure("R1", "SIGKILL to the next step: worst s", "restart", recovery(max), most=GPU_RESTART_WORST_S),
    Figure("R11", "two equal runs, bit for bit: 1 is yes", "repeat", equal_runs, least=1),
)
ELSEWHERE = (
    Verdict("P3", "cost of a deterministic backward pass", "", "<= 2 %", None, "there is no other one to compare with"),
    Verdict("P8", "gpt2_124m: tokens/s / nanoGPT's", "", ">= 1.5", None, "needs a checkout of nanoGPT on the GPU"),
    Verdict("P14", "cost of a save at every step", "", "<= 3 %", None, "only single saves are timed here"),
)
"""Goals of a GPU that ``bench gpu`` does not measure."""


def verdicts(rows: Mapping[str, list[Row]], why_not: Mapping[str, str]) -> list[Verdict]:
    """A line for each goal of one GPU, from the rows of each step of ``bench gpu``.

    Rows made on a CPU never count. ``why_not`` gives, for a step without what a goal needs, the reason.
    """
    counted = {step: made_by_gpu(of_step) for step, of_step in rows.items()}
    lines = [*kernel_verdicts(counted.get("kernels", []), why_not["kernels"])]
    lines += [figure.verdict(counted.get(figure.step, []), why_not[figure.step]) for figure in FIGURES]
    return sorted([*lines, *ELSEWHERE], key=lambda line: (line.id[0], int(line.id[1:])))


def made_by_gpu(rows: Iterable[Row]) -> list[Row]:
    """Those of the rows that say that a GPU made them."""
    return [row for row in rows if row.get("device", CPU) != CPU]


def kernel_verdicts(rows: list[Row], why_not: str) -> Iterator[Verdict]:
    """A line for each goal of the kernels: the worst shape's ratio, and at how many shapes it is reached."""
    found: dict[tuple[str, str, str], list[GoalResult]] = {}
    for result in kernel_results([row for row in rows if "variant" in row]):
        found.setdefault((result.id, f"{result.what}, {result.mode}", result.goal), []).append(result)
    failed = {f"speed / {row['variant']}, {row['mode']}": row["failed"] for row in rows if "failed" in row}
    for key in expected_of_kernels():
        what = f"{SUBJECTS[key[0]]}: {key[1]}"
        if not (group := found.get(key)):
            yield Verdict(key[0], what, "", key[2], None, failed.get(key[1], why_not))
            continue
        worst = (max if key[2].startswith("<=") else min)(group, key=lambda result: result.found)
        count = sum(result.reached for result in group)
        where = f"at {count} of {len(group)} shapes; worst: {worst.op} {worst.shape}"
        yield Verdict(key[0], what, f"{worst.found:.2f}", key[2], count == len(group), where)


def expected_of_kernels() -> Iterator[tuple[str, str, str]]:
    """(id, what, bound) of every goal of the kernels."""
    for goal in GOALS:
        yield goal.id, f"speed / {goal.peer}, {goal.mode}", f">= {goal.min_ratio}"
    yield "P1", f"speed / best sdpa, {BOTH}", ">= 1.0"
    for mode, min_ratio in MIN_SHARES:
        yield "P4", f"share of the copy rate, {mode}", f">= {min_ratio}"
    for peer, bound in (("materialised", 0.125), ("liger", 1.0)):
        yield "P7", f"peak / {peer}, {BOTH}", f"<= {bound:g}"


def verdict_table(lines: list[Verdict]) -> Table:
    """The table of ``verdicts``."""
    goal_table = Table(title="goals of one GPU", title_justify="left")
    for n, column in enumerate(("goal", "what", "found", "should be", "", "")):
        goal_table.add_column(column, justify="right" if n in (2, 3) else "left", no_wrap=n < 5)
    marks = {True: "[green]reached[/]", False: "[red]missed[/]", None: "[dim]not measured[/]"}
    for line in lines:
        goal_table.add_row(line.id, line.what, line.found, line.goal, marks[line.reached], f"[dim]{line.why}[/]")
    return goal_table
