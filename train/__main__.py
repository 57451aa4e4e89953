"""Command line ``python -m train <verb>``: the verbs that run in one process, without Ray."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # before the imports that take long: Ctrl-C is meant from the first moment on
    from train.util import streams

    streams.end_on_interrupt()

from rich.table import Table
from rich.text import Text

from train.config import load as configuration
from train.config import schema
from train.config.wandb_mode import with_wandb_mode
from train.errors import ExitCode, Stopped, UserError, guard_verb, shown_name
from train.events import Event
from train.reporting.terminal import UserConsole
from train.util import streams, utf8
from train.util.format import plural
from train.util.io import to_json

OUT, ERR = UserConsole(), UserConsole(stderr=True)


def evaluate(argv: Sequence[str]) -> int:
    """evaluate run.dir=FOLDER [checkpoint=latest|best|STEP] [split=val|test] [--json]: \
all that is measured on held-out text."""
    options = _options([a for a in argv if a != "--json"], {"run.dir": None, "checkpoint": "latest", "split": "val"})
    from train.cli import evaluate as evaluate_verb

    evaluate_verb.run(options, OUT, as_json="--json" in argv)
    return ExitCode.OK


def generate(argv: Sequence[str]) -> int:
    """generate run.dir=FOLDER [prompt=TEXT|prompts=FILE] [generation=CHOICE] [key=value ...] [--json].

    prompt=- reads one prompt, all of standard input; prompts=FILE one a line, and prompts=- those of standard input.
    generation=sample, greedy or beam takes a choice of conf/generation; without it, the run's own settings are.
    checkpoint=latest, best or a step. One text is written as it is drawn; --json writes a line for each. The keys:
    """
    from train.cli import generate as generate_verb

    known = {"run.dir": None, "checkpoint": "latest"} | dict.fromkeys(
        ["prompt", "prompts", "generation", *generate_verb.SETTING_KEYS], ""
    )
    options = _options([argument for argument in argv if argument != "--json"], known)
    generate_verb.run(options, as_json="--json" in argv)
    return ExitCode.OK


def chat(argv: Sequence[str]) -> int:
    """chat run.dir=FOLDER [checkpoint=latest|best|STEP] [system=TEXT] [generation=CHOICE] [key=value ...].

    A conversation with a run that was trained on data=chat, by its template: a line is a turn, the answer is written as
    it is drawn. /reset forgets what was said, /quit ends. The keys are those of generate.
    """
    from train.cli import chat as chat_verb
    from train.cli.generate import SETTING_KEYS

    known = {"run.dir": None, "checkpoint": "latest"} | dict.fromkeys(["system", "generation", *SETTING_KEYS], "")
    chat_verb.run(_options(argv, known))
    return ExitCode.OK


def look(argv: Sequence[str]) -> int:
    """look [the run's own command] [rows=4] [html=FILE]: the first rows as they are trained, targets coloured."""
    from train.cli import look as look_verb

    look_verb.run(argv, OUT)
    return ExitCode.OK


def export(argv: Sequence[str]) -> int:
    """export run.dir=FOLDER to=FOLDER [checkpoint=latest|best|STEP] [shard_mb=5000]: a folder that transformers loads.

    It is loaded there, and its logits and tokens compared with ours, before it gets its name.
    """
    options = _options(argv, {"run.dir": None, "to": None, "checkpoint": "latest", "shard_mb": "5000"})
    shard_mb = _number(options["shard_mb"])
    if not isinstance(shard_mb, int) or shard_mb < 1:
        raise UserError(f"shard_mb={options['shard_mb']} is not a number of megabytes")
    from train.pretrained.export import export as write

    done = write(Path(options["run.dir"]), Path(options["to"]), options["checkpoint"], shard_mb * 10**6)
    size = sum(file.stat().st_size for file in done.files) / 1e6
    where = f"{shown_name(options['run.dir'])}, step {done.step} -> {shown_name(options['to'])}"
    OUT.print(
        f"{where}: {done.family}, {plural(done.tensors, 'tensor')} in {plural(len(done.files), 'file')}, {size:,.1f} MB"
    )
    OUT.print(
        f"transformers {done.version} loads it: the same names and tokens; "
        f"logits differ by at most {done.difference:.1g}",
        end="",
    )
    OUT.print(f" where the largest is {done.largest:.3g}")
    return ExitCode.OK


def trace(argv: Sequence[str]) -> int:
    """trace run.dir=FOLDER step=N [--json]: the documents that stand in step N, counted as in metrics.jsonl."""
    options = _options([argument for argument in argv if argument != "--json"], {"run.dir": None, "step": None})
    from train.stability.find_documents import trace_step as find

    step = _number(options["step"])
    if not isinstance(step, int):
        raise UserError(f"step={options['step']} is not a number of a step")
    data_hash, parts = find(Path(options["run.dir"]), step)
    if "--json" in argv:
        OUT.print_json(data={"step": step, "data_hash": data_hash, "parts": [part.to_dict() for part in parts]})
        return ExitCode.OK
    table = Table(title=f"{shown_name(options['run.dir'])}, step {step}, data_hash {data_hash}", title_justify="left")
    for column in ("row", "stream", "document", "source", "tokens", "begins with"):
        table.add_column(column, justify="right" if column in ("row", "stream") else "left", no_wrap=column == "tokens")
    for part in parts:
        row = f"{part.row}{' (skipped)' if part.skipped else ''}"
        tokens = f"{part.tokens[0]:,} to {part.tokens[1]:,}"
        named = ", ".join([part.source, *(f"{key}={value}" for key, value in part.fields.items())])
        table.add_row(row, str(part.stream), part.document, shown_name(named), tokens, part.words)
    OUT.print(table)
    return ExitCode.OK


def worker(argv: Sequence[str]) -> int:
    """worker config=FILE corpus=FOLDER: one rank of a world that torchrun, or a like launcher, has started."""
    options = _options(argv, {"config": None, "corpus": None})
    from train.distributed import determinism, process_group
    from train.run import train_rank

    config = with_wandb_mode(configuration.read(Path(options["config"])), os.environ)
    os.environ.update(determinism.environment(config.cluster.deterministic))
    world = process_group.init_from_env()

    def emit(event: Event) -> None:
        if world.is_rank0:
            OUT.print_json(to_json(event.to_json()), indent=None)

    train_rank(config, options["corpus"], world, emit, lambda: False)
    process_group.destroy_group()
    # As the cluster's workers end, for DeepSpeed keeps groups, whose threads may abort the interpreter's own end.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(ExitCode.OK)


def prepare(argv: Sequence[str]) -> int:
    """prepare [data=stdlib|text|...] [data.paths=[...]] [key=value ...]: \
text to tokenised shards; resumable, idempotent."""
    from train.data.prepare.progress_bar import prepare_with_progress

    config = configuration.load(argv)
    if config.data.source != "mix":
        prepare_with_progress(config.data, OUT, config.objective)
        return ExitCode.OK
    from train.data.mixing.prepare_sources import prepare_mixture

    folder = prepare_mixture(config.data, lambda data: prepare_with_progress(data, OUT, config.objective))
    OUT.print(f"the mixture of {', '.join(config.data.sources)} is in {folder}")
    return ExitCode.OK


def plan(argv: Sequence[str]) -> int:
    """plan [the run's own command] [gpu=h100] [nodes=1] [gpus_a_node=8] [price=DOLLARS] [every=true].

    Memory of a GPU by part, tokens/s, days, GPU-hours and, at a price of a GPU-hour, cost; no GPU is needed.
    every=true: also every ZeRO stage, recomputation and micro-batch that makes the same steps.
    """
    from train.cli import plan as plan_verb

    plan_verb.run(argv, OUT, ERR)
    return ExitCode.OK


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "prepare": prepare,
    "evaluate": evaluate,
    "generate": generate,
    "chat": chat,
    "look": look,
    "export": export,
    "trace": trace,
    "plan": plan,
    "worker": worker,
}


def main(argv: Sequence[str]) -> int:
    """Run a verb; the exit code of the process."""
    verb = VERBS.get(argv[0]) if argv else None
    if verb is None:
        ERR.print("usage: python -m train " + "|".join(VERBS) + " [key=value ...]")
        return ExitCode.BAD_INPUT
    if {"-h", "--help"} & set(argv[1:]):
        OUT.print(verb.__doc__)
        if verb is generate:
            known = configuration.keys(schema.GenerationConfig)
            OUT.print("\n".join(configuration.key_lines({k: v for k, v in known.items() if k != "prompts"})))
        return ExitCode.OK
    try:
        with guard_verb(argv):
            return verb(argv[1:])
    except UserError as error:
        ERR.print(Text.assemble((f"{argv[0]}:", "bold red"), f" {error}"))
        return ExitCode.BAD_INPUT
    except Stopped:
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _options(argv: Sequence[str], known: dict[str, str | None]) -> dict[str, str]:
    """``key=value`` arguments over the defaults of ``known``; None there: it must be given."""
    given: dict[str, str | None] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise UserError(f"{argument!r} is not one of: " + " ".join(f"{k}=..." for k in known))
        given[key] = value
    missing = [key for key, value in {**known, **given}.items() if value is None]
    if missing:
        raise UserError(f"{missing[0]}=... is needed")
    return {key: value or "" for key, value in {**known, **given}.items()}


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


if __name__ == "__main__":
    utf8.use_utf8()
    argv = sys.argv[1:]
    shows = {"-h", "--help"} & set(argv) or {"evaluate", "generate", "trace", "look"} & set(argv[:1])
    (streams.guard_result if shows else streams.guard_report)()
    if not shows:
        streams.raise_on_signals(signal.SIGINT)
    sys.exit(main(argv))
