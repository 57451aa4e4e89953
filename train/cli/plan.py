"""The verb ``plan``: predicts a run's memory, time and cost on GPUs that need not be there, and prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from train.config import load as configuration
from train.config.schema import Config
from train.errors import UserError
from train.planning.choices import Choice, Cluster, alternatives, choose, least_state, missing
from train.planning.gpus import GPUS, REACHED_MEMORY, REACHED_PRODUCTS
from train.reporting.terminal import UserConsole
from train.util.format import count, duration

OPTIONS = {"gpu": "h100", "nodes": "1", "gpus_a_node": "8", "price": "", "every": "false"}
NAMES: dict[bool | str, str] = {False: "no", True: "blocks", "attention": "attention", "mlp": "mlp"}
"""What is recomputed, as the table of every way says it."""


def run(argv: Sequence[str], out: UserConsole, err: UserConsole) -> None:
    """Print the plan of a run's own command with the options gpu, nodes, gpus_a_node, price and every."""
    pairs = dict(word.partition("=")[::2] for word in argv)
    options = OPTIONS | {key: value for key, value in pairs.items() if key in OPTIONS}
    cluster, price = _cluster(options), _price(options["price"])
    if options["every"] not in ("true", "false"):
        raise UserError(f"every={options['every']} is neither true nor false")
    words = [word for word in argv if word.partition("=")[0] not in OPTIONS]
    config = configuration.load([*words, f"cluster.workers={cluster.size}"])
    if config.precision.name == "auto":
        config = config.model_copy(update={"precision": config.precision.model_copy(update={"name": "bf16"})})
    choice = choose(config, cluster)
    _show(choice, price, out)
    if options["every"] == "true":
        _show_every(choice, out, err)


def _cluster(options: dict[str, str]) -> Cluster:
    if options["gpu"] not in GPUS:
        raise UserError(f"gpu={options['gpu']} is not known. Known: {', '.join(GPUS)}")
    numbers = []
    for name in ("nodes", "gpus_a_node"):
        if not options[name].isdecimal() or options[name] == "0":
            raise UserError(f"{name}={options[name]} is not a number of 1 or more")
        numbers.append(int(options[name]))
    return Cluster(GPUS[options["gpu"]], *numbers)


def _price(text: str) -> float | None:
    if not text:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise UserError(f"price={text} is not a number of dollars a GPU-hour, of 0 or more")
    return price


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours > 10 else f"{hours:.2g}"


def _days(seconds: float) -> str:
    """A length of time in days, or in what fits a shorter one."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 86400:,.1f} days" if seconds > 86400 else duration(seconds)


def _show(choice: Choice, price: float | None, out: UserConsole) -> None:
    cluster, config, run = choice.cluster, choice.config, choice.run
    out.print(
        f"{count(run.params)} parameters on {cluster.size:,} {cluster.gpu.name}, ZeRO {config.zero.stage}, "
        f"{config.precision.name}, {config.batch.global_:,} x {config.batch.seq_len:,} tokens a step "
        f"({run.rows.micro_batches} micro-batches of {run.rows.micro} a GPU)"
    )
    size, unit = (1e9, "GB") if choice.total > 10e9 else (1e6, "MB")
    table = Table()
    table.add_column("memory of a GPU")
    table.add_column(unit, justify="right")
    for part, nbytes in choice.memory.items():
        table.add_row(part, f"{nbytes / size:,.2f}")
    table.add_row(f"in all, of {cluster.gpu.memory / size:,.0f}", f"{choice.total / size:,.2f}", style="bold")
    out.print(table)
    if not choice.fits:
        out.print(f"It does not fit. {missing(choice)}")
        return
    out.print(
        f"It fits. A step takes {choice.time.total_s:.3g} s, {choice.time.exposed_s:.3g} of them waiting for other "
        f"GPUs: {choice.tokens_per_s:,.0f} tokens/s, MFU {choice.mfu:.2f}"
    )
    cost = "" if price is None else f", {price * choice.gpu_hours:,.2f} dollars at {price:g} a GPU-hour"
    length, hours = _days(choice.run_s), _hours(choice.gpu_hours)
    out.print(f"{config.steps:,} steps: {length}, {hours} GPU-hours{cost}")
    out.print(
        f"Memory is that of a dry run of the engine; time is an estimate from data sheets, of which products reach "
        f"{REACHED_PRODUCTS:.0%} and memory {REACHED_MEMORY:.0%}: no GPU was measured."
    )


def _show_every(asked: Choice, out: UserConsole, err: UserConsole) -> None:
    """A line for each way to make the same steps; larger micro-batches than one that does not fit are left out."""
    table = Table(title="every way to make the same steps", title_justify="left")
    for column in ("ZeRO", "recomputation", "batch.micro", "GB a GPU", "a step, s", "MFU"):
        table.add_column(column, justify="right")
    full: set[tuple[Any, ...]] = set()
    fitting: list[Choice] = []
    for config in alternatives(asked.config, asked.cluster):
        recompute = getattr(config.model, "checkpoint_activations", False)
        way = config.zero.stage, recompute
        if way in full:
            continue
        said = [str(config.zero.stage), NAMES[recompute], str(config.batch.micro)]
        least = least_state(config, asked.run.params, asked.cluster.size)
        if least > asked.cluster.gpu.memory:
            full.add(way)
            table.add_row(*said[:2], "any", f"over {least / 1e9:,.0f}", "does not fit", "")
            continue
        err.print(f"dry run: ZeRO {said[0]}, recomputation {said[1]}, batch.micro={said[2]}")
        choice = choose(config, asked.cluster)
        if choice.fits:
            fitting.append(choice)
            table.add_row(*said, f"{choice.total / 1e9:,.1f}", f"{choice.time.total_s:,.2f}", f"{choice.mfu:.2f}")
        else:
            full.add(way)
            table.add_row(*said, f"{choice.total / 1e9:,.1f}", "does not fit", "")
    out.print(table)
    if not fitting:
        out.print(f"Nothing fits. {missing(asked)}")
        return
    best = min(fitting, key=lambda choice: choice.time.total_s)
    out.print(f"The fastest that fits: {_words(best.config)}")


def _words(config: Config) -> str:
    recompute = getattr(config.model, "checkpoint_activations", None)
    words = [f"zero.stage={config.zero.stage}", f"batch.micro={config.batch.micro}"]
    return " ".join(
        [*words, *([] if recompute is None else [f"model.checkpoint_activations={str(recompute).lower()}"])]
    )
